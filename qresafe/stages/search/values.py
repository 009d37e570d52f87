"""What a trial's experiment has at the keys of a space, whether the trial set them or not."""

from __future__ import annotations

from qresafe.artifacts import content_key
from qresafe.search_space import Params, value_at
from qresafe.search_spec import Search
from qresafe.specs import ExperimentSpec
from qresafe.stages.patch import key_spec
from qresafe.stages.search.ledger import Row


def row_values(search: Search, row: Row) -> Params:
    """Return each active key's value in a row; the first trial has the experiment's own values."""
    if row.params:
        found = {p.key: row.params[p.key] for p in search.space if p.key in row.params}
        extra = {key: value for key, value in row.params.items() if key not in found}
        return found | extra
    own: Params = {}
    for parameter in search.space:
        if parameter.active(own):
            own[parameter.key] = value_at(search.validation, parameter.key)
    return own


def trial_key(spec: ExperimentSpec) -> str:
    """Return a hash that two trials share exactly if all their stages are the same."""
    return content_key([upper_key(spec), key_spec(spec.patch)])


def upper_key(spec: ExperimentSpec) -> str:
    """Return a hash of all that the stages above the patch depend on."""
    left_out = {"name", "storage", "resources", "patch"}
    return content_key(spec.key_data(exclude=left_out))
