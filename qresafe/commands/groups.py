"""A command that is a group as well: `qresafe patch CONFIG` beside `qresafe patch apply`."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup


class RunByDefault(TyperGroup):
    """`qresafe GROUP CONFIG` is short for `qresafe GROUP run CONFIG`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        known = {*self.commands, *ctx.help_option_names}
        if args and args[0] not in known:
            args = ["run", *args]
        return super().parse_args(ctx, args)
