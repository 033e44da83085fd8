"""One command that starts the processes of a run on one machine or on many, over torchrun."""
