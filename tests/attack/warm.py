"""What commands import once they are called, so that forked ones, of which there are many, need not."""

from importlib import import_module

from optima.commands import COMMANDS

LATE = ("optima.report", "torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp")
"""What is imported where it is used."""


def import_everything() -> None:
    for command in COMMANDS.values():
        command.function()
    for name in LATE:
        import_module(name)
