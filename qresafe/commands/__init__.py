"""The commands of `qresafe`, one small file per family; nothing heavy is imported at start-up."""
