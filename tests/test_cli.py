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
    )
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


def test_a_folder_without_configuration_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        models.load_model(str(tmp_path))
    assert isinstance(nn.Linear(1, 1), nn.Module)


def test_only_systems_with_a_claim_file_are_measured():
    assert measured_keys(["beyond-batchnorm", "no-such-system"]) == ["beyond-batchnorm"]
    with pytest.raises(ValueError, match="no claims are measured"):
        claim("no-such-system")
