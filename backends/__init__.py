"""The built-in engines, one file each; they come in through the same hooks as a stranger's plug-in."""
