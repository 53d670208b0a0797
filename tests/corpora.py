"""What tests of corpora and of tokens share: folders of text, and errors that say something."""

from minisb.errors import MinisbError


def write_tree(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return root


class clear_error:
    """Passes if the block raises MinisbError with one line that holds `words`."""

    def __init__(self, words=""):
        self.words = words

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        assert kind is not None and issubclass(kind, MinisbError), f"raised {kind}"
        message = str(error)
        assert message and "\n" not in message and self.words in message, message
        return True
