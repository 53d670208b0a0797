"""python -m minisb COMMAND: the tools beside the two scripts.

A command is a module with HELP, add_arguments(parser) and main(args) -> exit code.
"""

from __future__ import annotations

import argparse
import importlib
import sys

from minisb.cli import Parser, run

#: Command -> its module, in the order of the help text.
COMMANDS = {
    "doctor": "minisb.doctor",
    "info": "minisb.info",
    "bench": "minisb.bench",
    "spikes": "minisb.spikes_cli",
    "quantize": "minisb.quantize",
    "upcycle": "minisb.upcycle",
    "experts": "minisb.experts_cli",
}

#: Modules with a command line of their own, `python -m minisb.NAME`; as commands they are understood, too.
ALONE = ("plots", "kernels")
#: What stands beside the commands, for the end of the help text.
BESIDE = """also to run:
  python train_small.py                      train; --help lists its flags
  python sample.py RUN                       write text with a trained run
  python -m minisb.plots RUN PICTURE.png     the loss curve of a run (extra plots)
  python -m minisb.kernels                   compile every CUDA kernel; needs no GPU (extra cuda-check)
  python -m lessons                          build the pieces yourself

extras, pip install -e ".[NAME]": plots, lessons, test, bench, gpu, gpu12, cuda-check"""


def main(arguments: list[str]) -> int:
    if arguments[:1] and arguments[0] in ALONE:
        return importlib.import_module(f"minisb.{arguments[0]}").main(arguments[1:])
    parser = Parser(
        prog="python -m minisb",
        description="The tools of minisb.  python -m minisb COMMAND --help says more.",
        epilog=BESIDE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        module = importlib.import_module(module)
        command = commands.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(command)
        command.set_defaults(main=module.main)
    args = parser.parse_args(arguments)
    return args.main(args)


if __name__ == "__main__":
    sys.exit(run(main))
