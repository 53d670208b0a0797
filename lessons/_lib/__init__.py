"""The machinery of the lessons: loading, checking, showing, exporting.  Lessons hold the ideas."""
