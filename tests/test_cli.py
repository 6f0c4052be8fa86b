import json

import pytest
import torch
from torch import nn

from headway import cli, models
from headway.claims.measure import claim, measured_keys


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    (tmp_path / "mymodels.py").write_text(
        "import torch\nfrom headway.residual import TransformerDecoder\n"
        "def build():\n    torch.manual_seed(0)\n"
        "    return TransformerDecoder(20, 16, 4, 2, max_length=8), torch.randint(0, 20, (4, 8))\n"
        "def bare():\n    return build()[0]\n"
        "def nothing():\n    return 3\n"
        "def fails():\n    return 1 / 0\n"
        "def images():\n    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))\n"
        "class Tagger(torch.nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n"
        "        self.lstm, self.head = torch.nn.LSTM(4, 8, batch_first=True), torch.nn.Linear(8, 3)\n"
        "    def forward(self, x, mode):\n        return self.head(self.lstm(x)[0]) * mode\n"
        "def tagger():\n    return Tagger(), (torch.randn(5, 7, 4), 2.0)\n"
        "def tagger_by_name():\n    return Tagger(), {'x': torch.randn(5, 7, 4), 'mode': 2.0}\n"
    )
    (tmp_path / "broken.py").write_text("def build(:\n")
    (tmp_path / "text.sqlite").write_text("no database at all, only a text that is long enough to be read as one" * 30)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["headway", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_methods_as_table_and_as_json(run):
    code, text, _ = run("methods", "--json")
    assert code == 0 and {"peri-ln", "mix-ln", "beyond-batchnorm"} <= {row["key"] for row in json.loads(text)}
    assert run("methods")[0] == 0


def test_show_explains_every_technique_that_can_be_imported(run):
    for key in ("peri-ln", "mix-ln", "beyond-batchnorm", "layer-norm"):
        code, text, _ = run("show", key)
        assert code == 0 and "arXiv" in text


def test_probe_of_a_factory_prints_writes_and_gives_json(run, tmp_path):
    code, text, _ = run("probe", "mymodels:build", "--save", "flow.html")
    assert code == 0 and "blocks.0" in text and (tmp_path / "flow.html").stat().st_size > 10_000
    code, text, _ = run("probe", "mymodels:build", "--json")
    assert code == 0 and json.loads(text)["rows"]


def test_a_factory_may_give_tensors_by_place_or_by_name_and_a_task_may_give_the_batch(run):
    for name in ("tagger", "tagger_by_name"):
        code, text, _ = run("probe", f"mymodels:{name}", "--json")
        assert code == 0 and [row["name"] for row in json.loads(text)["rows"]] == ["lstm", "head"]
    code, text, _ = run("probe", "mymodels:images", "--batch", "digits", "--json")
    found = json.loads(text)
    assert code == 0 and found["objective"] == "loss" and found["rows"][0]["grad_norm"] > 0


@pytest.mark.parametrize("kind", ["T5Model", "T5ForConditionalGeneration"])
def test_an_encoder_and_decoder_folder_is_probed(run, tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=50,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        architectures=[kind],
    )
    config.save_pretrained(tmp_path / "t5")
    code, text, _ = run("probe", "t5", "--json")
    names = [row["name"] for row in json.loads(text)["rows"]]
    assert code == 0 and any("encoder.block.1" in n for n in names) and any("decoder.block.1" in n for n in names)


def test_plan_and_apply_on_the_command_line(run, tmp_path):
    code, text, _ = run("plan", "mymodels:build", "peri-ln", "--json")
    assert code == 0 and json.loads(text)["parameters_after"] > json.loads(text)["parameters_before"]
    assert run("plan", "mymodels:build", "mix-ln(alpha=0.5)")[0] == 0
    code, text, _ = run("apply", "mymodels:build", "peri-ln", "-o", "out.safetensors")
    assert code == 0 and (tmp_path / "out.safetensors").exists() and "4 changes" in text


def test_a_hugging_face_folder_is_probed_changed_and_read_back(run, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=50, n_positions=32, n_embd=32, n_layer=4, n_head=4)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    assert run("apply", "gpt2", "mix-ln", "-o", "changed")[0] == 0
    assert json.loads((tmp_path / "changed/config.json").read_text())["headway"][0]["technique"].endswith(":MixLN")
    code, text, _ = run("probe", "changed", "--json")
    assert code == 0 and any(row["name"].endswith("h.3") for row in json.loads(text)["rows"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plan", "mymodels:build", "perri-ln"), "did you mean peri-ln"),
        (("plan", "mymodels", "peri-ln"), "neither a folder nor pkg.module:factory"),
        (("plan", "mymodels:gone", "peri-ln"), "could not be imported"),
        (("plan", "mymodels:nothing", "peri-ln"), "must return a torch.nn.Module"),
        (("probe", "mymodels:bare"), "without a batch"),
        (("plan", "mymodels:build", "peri-ln(gain=1)"), "no setting gain"),
        (("compare", "stdlib-text"), "name the arms"),
        (("claims", "nothing-known"), "no method"),
        (("compare", "digits", "--arms", "baseline", "--seeds", "two"), "--seeds takes a number"),
        (("compare", "digit", "--arms", "baseline"), "digits"),
        (("compare", "digits", "--arms", "baseline,perri-ln"), "did you mean peri-ln"),
        (("compare", "stdlib-text(depth=x y)", "--arms", "baseline"), "stdlib-text"),
        (("compare", "stdlib-text(deep=3)", "--arms", "baseline"), "deep"),
        (("compare", "gone.tasks:make", "--arms", "baseline"), "gone"),
        (("compare", "digits", "--arms", "baseline", "--budget", "soon"), "a budget is a number of steps or a time"),
        (("compare", "digits", "--arms", "baseline", "--precision", "fp8"), '"fp32" or "bf16"'),
        (("compare", "digits", "--arms", "baseline", "--engine", "slurm"), '"local" or "ray"'),
        (("compare", "digits", "--arms", "baseline", "--batch-size", "0"), "batch_size"),
        (("compare", "digits", "--arms", "baseline", "--store", "text.sqlite/runs.sqlite"), "cannot be written"),
        (("compare", "digits", "--arms", "baseline", "--store", "empty"), "cannot be written"),
        (("compare", "digits", "--arms", "baseline", "--store", "text.sqlite"), "is no headway result store"),
        (("compare", "mnist(folder=nowhere)", "--arms", "baseline"), "nowhere"),
        (("plan", "broken:build", "peri-ln"), "could not be imported"),
        (("plan", "mymodels:fails", "peri-ln"), "mymodels:fails() raised ZeroDivisionError: division by zero"),
        (("plan", "mymodels:__name__", "peri-ln"), "is no function but str"),
        (("plan", "mymodels:images", "peri-ln"), "known family"),
        (("plan", "empty", "peri-ln"), "holds no config.json"),
        (("plan", "mymodels:build", "mix-ln(alpha=2)"), "alpha"),
        (("apply", "mymodels:build", "beyond-batchnorm", "-o", "x.safetensors"), "beyond-batchnorm"),
        (("apply", "mymodels:build", "peri-ln", "-o", "text.sqlite/x.safetensors"), "text.sqlite"),
        (("probe", "mymodels:build", "--save", "gone/flow.html"), "gone"),
        (("probe", "mymodels:images", "--batch", "digit"), "digits"),
        (("show", "perri-ln"), "did you mean peri-ln"),
    ],
)
def test_wrong_use_is_one_sentence_and_status_2(run, arguments, message):
    code, _, err = run(*arguments)
    assert code == 2 and message in err and "Traceback" not in err


def test_the_command_a_report_names_runs_again_and_finds_everything_done(run, tmp_path):
    import shlex

    code, text, _ = run("compare", "stdlib-text(depth=1, dim=16)", "--arms", "baseline,peri-ln", "--seeds", "0,1",
                        "--budget", "2 steps", "--store", "r.sqlite", "--report", "r.html", "--json")  # fmt: skip
    first = json.loads(text)
    assert code == 0 and first["finished"] and first["arms"] == ["baseline", "peri-ln"] and first["seeds"] == [0, 1]
    program, *words = shlex.split(first["command"])
    assert program == "headway"
    code, text, _ = run(*words, "--report", "again.html", "--json")
    assert code == 0 and json.loads(text)["rows"] == first["rows"]


def test_doctor_reports_kernels_and_the_page_fault_trap(run):
    code, text, _ = run("doctor", "--json")
    found = json.loads(text)
    assert code == 0 and found["page_faults"]["slowdown"] > 0 and "norms" in found["kernels"]
    assert found["versions"]["torch"] == torch.__version__


def test_doctor_says_what_is_lost_without_kernels_and_how_to_mend_it(run, monkeypatch):
    import headway.doctor
    import headway.kernels.library

    monkeypatch.setattr(headway.doctor, "page_faults", lambda: {"reused_ms": 1.0, "fresh_ms": 9.0, "slowdown": 9.0})
    monkeypatch.setattr(headway.kernels.library, "status", lambda: {"moments": False, "norms": True})
    code, text, _ = run("doctor")
    words = " ".join(text.split())
    assert code == 0 and "moments NOT built" in words and "MALLOC_MMAP_THRESHOLD_=1073741824" in words
    assert "plain PyTorch, slower: moments; run `python -m headway.kernels.build`" in words
    monkeypatch.setattr("headway.kernels.build.compiler", lambda: None)
    found = json.loads(run("doctor", "--json")[1])
    assert found["compiler"] is None and any("install a C++ compiler" in sentence for sentence in found["advice"])
    monkeypatch.setenv("HEADWAY_KERNELS", "reference")
    assert any("unset HEADWAY_KERNELS" in sentence for sentence in json.loads(run("doctor", "--json")[1])["advice"])
    assert {"avx2", "avx512f"} <= set(found["features"]) or not found["features"]


def test_a_folder_without_configuration_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        models.load_model(str(tmp_path))
    assert isinstance(nn.Linear(1, 1), nn.Module)


def test_only_systems_with_a_claim_file_are_measured():
    assert measured_keys(["beyond-batchnorm", "no-such-system"]) == ["beyond-batchnorm"]
    with pytest.raises(ValueError, match="no claims are measured"):
        claim("no-such-system")
