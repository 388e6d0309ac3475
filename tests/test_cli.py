"""The command line: what it prints, writes and returns."""

import importlib.metadata
import os
import subprocess
import sys

import numpy
import pytest
import safetensors.torch
import torch
from torch import nn

import torchquant
from torchquant import cli_inputs, diagnose
from torchquant.cli import main
from torchquant.report import LayerReport, Report

FOREIGN_BUILD = """
import sys, types
sys.modules["torchquant._build"] = types.SimpleNamespace(torch_version="1.13.1+cpu", cuda_version="")
"""


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with a user's module, calibration inputs and text; it is the current directory."""
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "def small():\n"
        "    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Linear(12, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))\n"
        "def wrong():\n"
        "    return 3\n"
    )
    torch.save(torch.randn(64, 12, generator=torch.Generator().manual_seed(1)), tmp_path / "inputs.pt")
    (tmp_path / "words.txt").write_text("a little text, not much longer than it has to be. " * 8)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop("mine", None)
    return tmp_path


def run_quantize(*more: str, model: str = "mine:small") -> int:
    return main(["quantize", model, "--scheme", "W3A16", "--calib", "inputs.pt", "--out", "out", *more])


def test_quantize_saves_a_model_that_loads_and_reports(workplace, capsys):
    assert run_quantize("--report", "report.html", "--method", "gptq+comq") == 0
    printed = capsys.readouterr().out
    assert "2 layers in" in printed and printed.rstrip().endswith("0 not ok")
    report = Report.from_json("out/report.json")
    assert [layer.name for layer in report.layers] == ["0", "2"]
    assert all(layer.error < layer.error_rtn for layer in report.layers)
    assert (workplace / "report.html").read_text().startswith("<!doctype html>")
    import mine

    x = torch.load("inputs.pt")
    expected = mine.small()
    torchquant.quantize_(expected, "W3A16", [x], method="gptq+comq", progress=False)
    loaded = torchquant.load("out", mine.small)
    torch.testing.assert_close(loaded(x), expected(x), rtol=1e-4, atol=1e-5)


def test_overrides_and_ignored_layers(workplace):
    assert run_quantize("--override", "0=W8A16", "--ignore", "2", "--method", "rtn") == 0
    layers = Report.from_json("out/report.json").layers
    assert [(layer.name, layer.scheme) for layer in layers] == [("0", "W8A16")]


def test_override_may_leave_a_layer_alone(workplace):
    assert run_quantize("--override", "2=none", "--method", "rtn") == 0
    assert [layer.name for layer in Report.from_json("out/report.json").layers] == ["0"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--ignore", "nothing"], "torchquant: quantize_: ignore: 'nothing' matches no layer"),
        (["--calib", "absent.pt"], "absent.pt"),
    ],
)
def test_errors_are_one_line_without_a_traceback(workplace, capsys, more, message):
    assert run_quantize(*more) == 1
    text = capsys.readouterr().err
    assert message in text and text.count("\n") == 1 and text.startswith("torchquant: ")
    assert not (workplace / "out").exists()


def test_debug_shows_the_traceback(workplace):
    with pytest.raises(ValueError, match="matches no layer"):
        run_quantize("--ignore", "nothing", "--debug")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("mine", "torchquant: model: expected module:factory or a Hugging Face directory, got 'mine'"),
        ("mine:wrong", "torchquant: model: mine:wrong returned int, not a torch.nn.Module"),
        ("mine:absent", "torchquant: module 'mine' has no attribute 'absent'"),
        ("absent_module:x", "torchquant: No module named 'absent_module'"),
    ],
)
def test_wrong_models(workplace, capsys, model, message):
    assert run_quantize(model=model) == 1
    assert capsys.readouterr().err == message + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required"),
        (
            ["quantize", "m:f", "--out", "o", "--scheme", "W9A16"],
            "argument --scheme: Scheme: weight_bits must be 2..8, got 9",
        ),
        (["quantize", "m:f", "--out", "o", "--scheme", "4bit"], "argument --scheme: Scheme: expected W<bits>A<bits>"),
        (["quantize", "m:f", "--out", "o", "--method", "magic"], "argument --method: method: unknown step 'magic'"),
        (["quantize", "m:f", "--out", "o", "--override", "head"], "expected PATTERN=SCHEME, got 'head'"),
        (["quantize", "m:f", "--out", "o"], "--method auto needs --calib FILE"),
        (["demo", "--only", "resnet"], "argument --only: invalid choice: 'resnet'"),
    ],
)
def test_wrong_usage_is_exit_code_2(capsys, arguments, message):
    try:
        code = main(arguments)
    except SystemExit as exit_:
        code = exit_.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_report_prints_and_draws(tmp_path, capsys):
    Report([LayerReport("fc", "Linear", error_rtn=0.5, error=0.25)]).to_json(tmp_path / "r.json")
    assert main(["report", str(tmp_path / "r.json")]) == 0
    assert "1 layers in" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "r.json"), "--html", str(tmp_path / "r.html")]) == 0
    assert "Error per layer" in (tmp_path / "r.html").read_text()


def test_report_refuses_another_file(tmp_path, capsys):
    (tmp_path / "r.json").write_text("{}")
    assert main(["report", str(tmp_path / "r.json")]) == 1
    assert "is not a report written by to_json" in capsys.readouterr().err


# Inputs


@pytest.mark.parametrize("kind", ["pt", "npy", "safetensors"])
def test_a_tensor_is_cut_into_batches_whatever_file_it_comes_in(tmp_path, kind):
    x = torch.arange(30.0).view(10, 3)
    path = tmp_path / f"x.{kind}"
    write = {
        "pt": torch.save,
        "npy": lambda t, p: numpy.save(p, t.numpy()),
        "safetensors": lambda t, p: safetensors.torch.save_file({"x": t}, p),
    }
    write[kind](x, path)
    batches = cli_inputs.load_calibration(path, "m:f", byte_level=False, length=1, samples=1, batch=4)
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert torch.equal(torch.cat(batches), x)


def test_named_tensors_become_keyword_batches(tmp_path):
    safetensors.torch.save_file({"a": torch.zeros(5, 2), "b": torch.ones(5)}, tmp_path / "x.safetensors")
    path = tmp_path / "x.safetensors"
    batches = cli_inputs.load_calibration(path, "m:f", byte_level=False, length=1, samples=1, batch=3)
    assert [(batch["a"].shape, batch["b"].shape) for batch in batches] == [((3, 2), (3,)), ((2, 2), (2,))]


def test_inputs_of_different_length_are_refused():
    with pytest.raises(ValueError, match="differ in their first dimension"):
        cli_inputs.in_batches({"a": torch.zeros(9), "b": torch.zeros(2)}, 4)


def test_a_pickle_cannot_run_code(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "x.pt")
    with pytest.raises(Exception, match="weights_only|Weights only"):
        cli_inputs.load_calibration(tmp_path / "x.pt", "m:f", byte_level=False, length=1, samples=1, batch=1)


def test_bytes_of_a_text(workplace):
    path = workplace / "words.txt"
    batches = cli_inputs.load_calibration(path, "m:f", byte_level=True, length=50, samples=4, batch=3)
    assert [batch["input_ids"].shape for batch in batches] == [(3, 50), (1, 50)]
    assert bytes(batches[0]["input_ids"][0].tolist()) == path.read_bytes()[:50]


def test_a_text_needs_a_tokenizer(workplace):
    with pytest.raises(ValueError, match="no tokenizer.json; use --byte-level"):
        cli_inputs.load_calibration(workplace / "words.txt", "dir", byte_level=False, length=5, samples=4, batch=3)


def test_a_text_that_is_too_short(workplace):
    with pytest.raises(ValueError, match="has 400 tokens, fewer than --sequence-length 500"):
        cli_inputs.load_calibration(workplace / "words.txt", "d", byte_level=True, length=500, samples=4, batch=3)


def test_hugging_face_directory(workplace, capsys):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained("llama")
    arguments = ["quantize", "llama", "--scheme", "W4A16", "--out", "out", "--ignore", "lm_head"]
    text = ["--calib", "words.txt", "--byte-level", "--sequence-length", "32", "--method", "gptq"]
    assert main([*arguments, *text]) == 0
    report = Report.from_json("out/report.json")
    assert {layer.name.rpartition(".")[2] for layer in report.layers} >= {"q_proj", "down_proj"}
    assert "lm_head" not in {layer.name for layer in report.layers}
    assert report.layers[0].tokens == 12 * 32


# diagnose


def test_diagnose_names_versions_and_tiers(capsys):
    assert main(["diagnose"]) == 0
    text = capsys.readouterr().out
    facts = dict(line.split("  ", 1) for line in text.splitlines())
    assert facts["torch"].strip() == torch.__version__
    assert facts["torchquant"].strip() == importlib.metadata.version("torchquant")
    assert facts["cpu tiers"].strip() == ", ".join(torchquant._C.cpu_tiers())
    assert facts["built for"].strip().startswith("torch 2.")


def test_an_absent_package_is_said_to_be_absent():
    assert diagnose.version_of("surely-not-installed-anywhere") == "not installed"


def command(*arguments: str, foreign: bool, folder) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, if wanted with an operator library that was built for another torch."""
    (folder / "sitecustomize.py").write_text(FOREIGN_BUILD if foreign else "")
    env = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    whole = [sys.executable, "-m", "torchquant", *arguments]
    return subprocess.run(whole, capture_output=True, text=True, env=env, timeout=120)


def test_module_and_command_are_the_same(tmp_path):
    done = command("diagnose", foreign=False, folder=tmp_path)
    assert done.returncode == 0 and "operators" in done.stdout and done.stderr == ""


def test_diagnose_works_where_the_library_refuses_to_load(tmp_path):
    done = command("diagnose", foreign=True, folder=tmp_path)
    assert done.returncode == 1 and done.stderr == ""
    facts = dict(line.split("  ", 1) for line in done.stdout.splitlines())
    assert facts["operators"].strip().startswith("not loaded: torchquant: built for torch 1.13.1+cpu, found torch 2.")
    assert facts["built for"].strip() == "torch 1.13.1+cpu, CUDA none"
    assert facts["torch"].strip() == torch.__version__


def test_other_commands_then_fail_with_that_one_line(tmp_path):
    done = command("report", "x.json", foreign=True, folder=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("torchquant: built for torch 1.13.1+cpu") and done.stderr.count("\n") == 1
