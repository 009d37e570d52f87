"""The tables that stages hand to each other: pyarrow schemas and their checks.

Every stage declares the columns that it needs, returns one row per input row, and counts what it
drops, by reason. A failed generation is a row with `error` set, never a lost row.
"""

from __future__ import annotations

from typing import get_args

import pyarrow as pa

from qresafe.errors import DataError, nearest
from qresafe.spec_base import Axis as Axis
from qresafe.spec_base import Kind as Kind
from qresafe.spec_base import Outcome as Outcome

OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
REFUSALS: tuple[Outcome, ...] = ("refused", "partial")  # of either kind, as XSTest's people count

# Columns that came later: a table of an earlier version, without them, is still read.
LATER = ("follow_ups", "follow_up_answers")

_TOKENS = pa.list_(pa.int32())
_LOGPS = pa.list_(pa.float32())

PROMPT = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),  # unique and stable within a set
        pa.field("axis", pa.string(), nullable=False),  # Axis, or Kind for calibration prompts
        pa.field("prompt", pa.string(), nullable=False),  # never empty
        pa.field("target", pa.string()),  # reference answer, where the benchmark has one
        pa.field("category", pa.string()),
        pa.field("lang", pa.string()),
        pa.field("benchmark", pa.string()),  # where the prompt comes from; results are split by it
        # What the user says next, each asked after the answer before it; null: one turn.
        pa.field("follow_ups", pa.list_(pa.string())),
    ]
)

COMPLETION = pa.schema(
    [
        *PROMPT,
        pa.field("sample", pa.int32(), nullable=False),  # 0 for greedy decoding
        pa.field("completion", pa.string(), nullable=False),
        pa.field("completion_ids", _TOKENS, nullable=False),  # with the end token if it came
        pa.field("prompt_tokens", pa.int32(), nullable=False),
        pa.field("new_tokens", pa.int32(), nullable=False),
        pa.field("finish", pa.string(), nullable=False),  # stop | length | error
        pa.field("error", pa.string()),
        pa.field("target_logp", pa.float64()),  # sum log p(target tokens | prompt), nats
        pa.field("target_tokens", pa.int32()),
        pa.field("follow_up_answers", pa.list_(pa.string())),  # one per follow-up
    ]
)

PAIR = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),  # Kind
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("chosen", pa.string(), nullable=False),  # y_w: the teacher W's answer
        pa.field("rejected", pa.string(), nullable=False),  # y_l: Q0's answer
        pa.field("preference", pa.bool_(), nullable=False),  # True: a DPO pair (x, y_w, y_l)
        pa.field("prompt_ids", _TOKENS, nullable=False),
        pa.field("chosen_ids", _TOKENS, nullable=False),
        pa.field("rejected_ids", _TOKENS, nullable=False),
        # W's distribution on the first n tokens of chosen: n * top_k entries each, row-major.
        pa.field("teacher_top_k", pa.int32()),
        pa.field("teacher_ids", _TOKENS),
        pa.field("teacher_logps", _LOGPS),
    ]
)

REFERENCE_LOGPS = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("chosen_logp", pa.float64(), nullable=False),  # log pi_Q0(y_w | x), nats
        pa.field("rejected_logp", pa.float64(), nullable=False),  # log pi_Q0(y_l | x), nats
    ]
)

VERDICT = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("sample", pa.int32(), nullable=False),
        pa.field("axis", pa.string(), nullable=False),
        pa.field("judge", pa.string(), nullable=False),
        pa.field("outcome", pa.string(), nullable=False),  # Outcome
        pa.field("reason", pa.string(), nullable=False),  # the rule or phrase that decided
    ]
)


def require_columns(table: pa.Table, needed: pa.Schema, where: str) -> pa.Table:
    """Return `table` with exactly the columns of `needed`, cast to its types.

    Args:
        table: Any table that has at least the needed columns.
        needed: One of the schemas of this module.
        where: The file or stage that the table comes from, for the message.

    Raises:
        DataError: A column is missing or has a type that cannot be cast.
    """
    for name in needed.names:
        if name in LATER and name not in table.column_names:
            empty = pa.nulls(table.num_rows, needed.field(name).type)
            table = table.append_column(needed.field(name), empty)
        if name not in table.column_names:
            remedy = nearest(name, table.column_names)
            raise DataError(f"no column {name!r}", where=where, remedy=remedy)
    try:
        return table.select(needed.names).cast(needed)
    except (pa.ArrowInvalid, ValueError) as error:
        raise DataError(f"wrong column type ({error})", where=where) from error
