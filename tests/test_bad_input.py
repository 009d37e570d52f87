"""Everything that a user can get wrong: one sentence, exit code 2, before expensive work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import save_tiny_llama
from foreign import write_gguf

from qresafe.cli import main
from qresafe.quantize_specs import BnbSpec, RtnSpec
from qresafe.quantizers import bnb, rtn

Refused = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tiny_llama: Path, tmp_path: Path) -> Refused:
    """Run a command that must fail with one sentence; return the sentence."""

    def run(*sets: str, command: str = "run", preset: str = "cpu-smoke") -> str:
        defaults = (
            f"storage={tmp_path / 'store'}",
            f"model.path={tiny_llama}",
            "resources.workers=0",
        )
        given = [word for each in (*defaults, *sets) for word in ("--set", each)]
        with pytest.raises(SystemExit) as leaving:
            main([command, preset, *given])
        out, err = capsys.readouterr()
        lines = err.strip().splitlines()
        assert leaving.value.code == 2, err
        assert out == ""
        assert "Traceback" not in err
        assert lines[-1].startswith("error: ")
        done = [line for line in lines if line.startswith("+ ") and "start Ray" not in line]
        assert done == [], "work was done before"
        return lines[-1]

    return run


def prompts(path: Path, **more: object) -> str:
    """Return the override that evaluates on a prompt file."""
    return f"evaluate.prompts={json.dumps([{'benchmark': 'prompts', 'path': str(path), **more}])}"


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_unknown_judge(refused: Refused) -> None:
    assert "did you mean keyword" in refused("evaluate.judges=[keywrd]")
    assert "did you mean refusal" in refused("pairs.judge=refusl")


def test_unknown_benchmark(refused: Refused) -> None:
    assert "did you mean advbench" in refused("evaluate.prompts=[{benchmark: advbnch}]")


def test_missing_prompt_file(refused: Refused) -> None:
    assert "absent.csv" in refused("evaluate.prompts=[{benchmark: advbench, path: absent.csv}]")


@pytest.mark.parametrize(
    ("content", "column", "fragments"),
    [
        ("prompt,x\na,1\nb,2,3\n", "prompt", ["mine.csv", "malformed CSV"]),
        ("text,x\na,1\n", "prompt", ["mine.csv", "'prompt'"]),
        ("text,x\na,1\n", "txt", ["mine.csv", "'txt'", "text"]),
        ("prompt,x\na,1\n,2\n", "prompt", ["mine.csv", "empty"]),
        ("", "prompt", ["mine.csv"]),
        ("prompt\n", "prompt", ["mine.csv"]),
    ],
)
def test_malformed_prompt_files(
    refused: Refused, tmp_path: Path, content: str, column: str, fragments: list[str]
) -> None:
    path = write(tmp_path, "mine.csv", content)
    text = refused(prompts(path, column=column))
    for fragment in fragments:
        assert fragment in text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("mine.jsonl", '{"prompt": "a"}\n{"prompt": \n'),
        ("mine.jsonl", '{"prompt": 3}\n'),
        ("mine.parquet", "not parquet"),
        ("mine.doc", "hello"),
    ],
)
def test_other_malformed_prompt_files(
    refused: Refused, tmp_path: Path, name: str, content: str
) -> None:
    assert name in refused(prompts(write(tmp_path, name, content), column="prompt"))


@pytest.mark.parametrize(
    ("sets", "says"),
    [
        ("quantize.group_size=0", "quantize.group_size: must be 1 or more weights, or -1"),
        ("quantize.group_size=-2", "quantize.group_size: must be 1 or more weights, or -1"),
        ("quantize.group_size=large", "quantize.group_size: must be a whole number"),
        ("quantize.bits=5", "quantize.bits: must be 2, 3, 4 or 8 (got 5) in --set"),
        ("quantize.lr=0", "quantize.lr: must be more than 0 (got 0) in --set"),
        ("quantize.skip=lm_head", "quantize.skip: must be a list, such as [a, b]"),
        ("quantize.skip=['']", "quantize.skip: must not be empty in --set"),
        ("quantize.calibration.path=''", "quantize.calibration.path: must not be empty"),
        ("quantize.method=", "quantize.method: must not be empty in --set: choose one of"),
        ("quantize.method=checkpoint quantize.path=", "quantize.path: must not be empty in --set"),
        ("quantize.method=checkpoint quantize.path=''", "quantize.path: must not be empty"),
        ("quantize.method=checkpoint", "quantize.path: must be given"),
        ("quantize=rtn", "quantize: must be a mapping, such as {a: 1} (got 'rtn')"),
        ("model.path=''", "model.path: must not be empty"),
        ("pairs.path=''", "pairs.path: must not be empty"),
        ("quantize.method=critical16 quantize.base.method=checkpoint", "checkpoint cannot be"),
        ("quantize.method=critical16 quantize.base.method=awq", "AWQ rescales the weights"),
        ("quantize.method=qlora quantize.base.method=gptq", "gptq cannot be quantize.base in"),
    ],
)
def test_values_that_cannot_be(refused: Refused, sets: str, says: str) -> None:
    assert says in refused(*sets.split())


ODD = "quantize.method=critical16 quantize.base.method="


@pytest.mark.parametrize(
    ("sets", "says"),
    [
        ("quantize.group_size=48", "inputs of model.layers.0.self_attn.q_proj are no multiple"),
        ("quantize.method=gptq", "are no multiple of group_size 128"),
        ("quantize.method=rtn quantize.skip=[lm_hed]", "no layer 'lm_hed' to leave alone in"),
        ("quantize.method=bnb quantize.skip=[lm_hed]", "no layer 'lm_hed' to leave alone in"),
        ("quantize.method=bnb quantize.skip=[proj,lm_head]", "no linear layer to quantize"),
        ("quantize.method=qlora quantize.targets=[qproj]", "choose among down_proj, gate_proj"),
        ("quantize.method=qlora quantize.base.skip=[proj,lm_head]", "no linear layer to quantize"),
        (f"{ODD}rtn quantize.base.group_size=48", "are no multiple of group_size 48"),
        (f"{ODD}bnb quantize.base.skip=[up]", "no layer 'up' to leave alone"),
        (f"{ODD}aqlm quantize.base.group_size=48", "are no multiple of 48"),
        # 16 x 64 of k_proj are 2048 of all 73,728 weights
        (f"{ODD}rtn quantize.structure=layers quantize.fraction=0.02", "use at least 0.0278"),
    ],
)
def test_layers_that_do_not_fit(refused: Refused, sets: str, says: str) -> None:
    assert says in refused(*sets.split())


def test_four_bit_layers_that_the_cpu_cannot_run(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """48 inputs are no 64s, but only where bitsandbytes runs its own CPU kernel."""
    from bitsandbytes import functional

    odd = save_tiny_llama(tmp_path / "odd", hidden=48)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(functional, "has_avx512bf16", lambda: True)
    for method in ("bnb", "qlora"):
        text = refused(f"model.path={odd}", f"quantize.method={method}")
        assert "q_proj is 48 x 48, and bitsandbytes' 4-bit kernel on this CPU takes" in text
    monkeypatch.setattr(functional, "has_avx512bf16", lambda: False)
    assert len(bnb.planned(odd, BnbSpec())) == len(bnb.planned(odd, BnbSpec(format="int8"))) == 14


VLLM = "evaluate.generate.engine=vllm"


@pytest.mark.parametrize(
    ("sets", "says"),
    [
        ("quantize.method=rtn quantize.bits=3", "it runs integers of 4 and 8 bits, not 3"),
        ("quantize.method=qlora quantize.deploy=adapter", "leave out the adapter"),
        ("quantize.method=critical16", "leave out the 16-bit weights of structure: weights"),
        ("quantize.method=rtn", "engine 'vllm' needs a GPU for each worker"),
    ],
)
def test_engines_that_cannot_run_the_format(refused: Refused, sets: str, says: str) -> None:
    assert says in refused(VLLM, *sets.split())


@pytest.mark.parametrize(
    ("scheme", "says"),
    [
        (RtnSpec(bits=3, group_size=32), "it runs integers of 4 and 8 bits, not 3"),
        (RtnSpec(bits=4, group_size=32), "engine 'vllm' needs a GPU for each worker"),
    ],
)
def test_the_width_of_a_checkpoint_made_elsewhere_is_looked_at_too(
    refused: Refused, tiny_llama: Path, tmp_path: Path, scheme: RtnSpec, says: str
) -> None:
    rtn.quantize(tiny_llama, tmp_path, scheme)
    q0 = ("quantize.method=checkpoint", f"quantize.path={tmp_path / 'checkpoint'}")
    assert says in refused(VLLM, *q0)


def test_vllm_is_given_no_gguf_file(
    refused: Refused, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gguf import GGMLQuantizationType, quants

    monkeypatch.setenv("QRESAFE_CACHE", str(tmp_path / "cache"))
    kind = GGMLQuantizationType.Q8_0
    write_gguf(tmp_path / "q.gguf", tiny_llama, lambda w: (quants.quantize(w, kind), kind))
    q0 = ("quantize.method=checkpoint", f"quantize.path={tmp_path / 'q.gguf'}")
    assert "quantize.path is a .gguf file" in refused(VLLM, *q0)
    assert "model.path is a .gguf file" in refused(VLLM, f"model.path={tmp_path / 'q.gguf'}")


def test_malformed_calibration(refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "pool.parquet"
    pq.write_table(pa.table({"prompt": ["a"], "axis": ["harmfull"]}), path)
    assert "harmfull" in refused(f"pairs.path={path}")
    assert "absent.csv" in refused("pairs.path=absent.csv")


def test_missing_model(refused: Refused, tmp_path: Path) -> None:
    assert "absent" in refused(f"model.path={tmp_path / 'absent'}")
    (tmp_path / "empty").mkdir()
    assert "empty" in refused(f"model.path={tmp_path / 'empty'}")


def test_model_without_a_chat_template(refused: Refused, tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    shutil.copytree(tiny_llama, folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert "chat template" in refused(f"model.path={folder}")


def test_a_model_file_that_is_cut_short(refused: Refused, tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(tiny_llama, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert str(folder) in refused(f"model.path={folder}")


def test_storage_that_cannot_be_written(refused: Refused, tmp_path: Path) -> None:
    blocked = write(tmp_path, "file", "not a folder")
    assert str(blocked) in refused(f"storage={blocked}/sub")
    assert "nosuchscheme" in refused("storage=nosuchscheme://bucket")


def test_gpus_that_are_not_there(refused: Refused) -> None:
    assert "GPU" in refused("resources.gpus_per_worker=1")


@pytest.mark.ray
@pytest.mark.parametrize("command", [pytest.param("quantize", marks=pytest.mark.long), "generate"])
def test_more_workers_than_the_cluster_has_room_for(refused: Refused, command: str) -> None:
    text = refused("resources.workers=1", "resources.gpus_per_worker=4", command=command)
    assert "GPUs" in text
    assert "room for 0" in text


def test_a_latent_start_without_latents(refused: Refused) -> None:
    told = refused("patch.start=latent", "quantize.method=rtn")
    assert "no latent weights of Q0 are kept in patch.start" in told
    assert "quantize.keep_latent=true" in told
