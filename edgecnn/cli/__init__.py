"""The command line: click, one file per command, each imported when it is used."""
