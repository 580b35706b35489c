"""The command `muai`: its own part, and the commands that the other packages bring."""
