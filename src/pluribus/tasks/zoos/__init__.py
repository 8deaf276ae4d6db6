"""One zoo a file; the file's name is the zoo's name, and its `build` makes it."""
