"""`sparsify push` against a stand-in for the Hub's endpoints, and the model card against huggingface_hub's own reader."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml
from huggingface_hub import ModelCard, constants
from huggingface_hub.repocard_data import model_index_to_eval_results

from sparsify import cli
from sparsify.errors import CheckpointError, SparsifyError
from sparsify.manifest import seal, verify
from sparsify.report.hub import card_with_figures, push

from .sample import sample_bench, sample_evaluations, sample_metrics, sample_tasks

CARD = "---\nlibrary_name: sparsify\ntags:\n- '2:4'\n---\n\n# tiny, compressed by sparsify\n\n## Recipe\n\n```yaml\nversion: 1\n```\n"
TOKEN = "hf_of_a_test"


class Hub(ThreadingHTTPServer):
    """What huggingface_hub asks to make a repository and to commit to it; keeps what it is sent."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.asked, self.files, self.uploads, self.refuses = [], {}, {}, False

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def answer(self, value, status=200):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self):
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_PUT(self):
        self.server.uploads[self.path.rsplit("/", 1)[1]] = self.body()
        self.answer({})

    def do_POST(self):
        hub, body = self.server, self.body()
        hub.asked.append((self.path, self.headers.get("Authorization")))
        if hub.refuses:
            return self.answer({"error": "Invalid credentials in Authorization header"}, 401)
        if self.path == "/api/repos/create":
            hub.made = json.loads(body)
            return self.answer({"url": f"{hub.url}/org/tiny", "id": "org/tiny"})
        if self.path == "/api/validate-yaml":
            return self.answer({"warnings": [], "errors": []})
        if "/preupload/" in self.path:
            modes = [
                {"path": one["path"], "uploadMode": "lfs" if one["path"].endswith("safetensors") else "regular", "shouldIgnore": False}
                for one in json.loads(body)["files"]
            ]  # fmt: skip
            return self.answer({"files": modes})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{hub.url}/lfs/{one['oid']}", "header": {}}}}
                for one in json.loads(body)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.files[value["path"]] = hub.uploads[value["oid"]]
            return self.answer(
                {"success": True, "commitOid": "c0ffee", "commitUrl": f"{hub.url}/org/tiny/commit/c0ffee"}
            )
        return self.answer({"error": f"what is {self.path}"}, 404)


@pytest.fixture
def hub(monkeypatch):
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def finished(tmp_path):
    """A directory as `sparsify apply` leaves it, as far as files and manifest go."""
    place = tmp_path / "tiny"
    place.mkdir()
    evaluation = {**sample_evaluations()[1], **sample_tasks()}
    for name, content in {
        "config.json": "{}", "README.md": CARD, "metrics.json": json.dumps({**sample_metrics(2), "evaluation": evaluation}),
        "model.safetensors": "weights" * 1000,
    }.items():  # fmt: skip
        (place / name).write_text(content)
    seal(place)
    (place / "report.html").write_text("<html>")
    return place


def test_a_checkpoint_arrives_whole(hub, finished, tmp_path, capsys):
    assert cli.main(["push", str(finished), "org/tiny", "--private", "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["commit"] == "c0ffee" and done["files"] == 6
    assert "private" in (hub.made.get("visibility"), hub.made.get("private") and "private")
    assert (hub.made["organization"], hub.made["name"]) == ("org", "tiny")
    assert all(token == f"Bearer {TOKEN}" for _, token in hub.asked)
    assert set(hub.files) == {
        "README.md",
        "SHA256SUMS",
        "config.json",
        "metrics.json",
        "model.safetensors",
        "report.html",
    }
    assert hub.files["model.safetensors"] == b"weights" * 1000
    arrived = tmp_path / "arrived"
    arrived.mkdir()
    for name, content in hub.files.items():
        (arrived / name).write_bytes(content)
    assert verify(arrived).good, "the manifest that arrived lists the card that arrived"
    assert (finished / "README.md").read_text() == CARD and verify(finished).good, "the directory is as it was"
    card = hub.files["README.md"].decode()
    assert "| sparse24 " not in card and "| tiny | 99.9 MB | 41.41 | 0.6830 |" in card
    digest = hashlib.sha256(hub.files["README.md"]).hexdigest()
    assert f"{digest}  README.md" in hub.files["SHA256SUMS"].decode()


def test_the_metadata_are_what_was_measured(finished):
    rows = [{**row, **sample_tasks()} for row in sample_evaluations()]
    once = card_with_figures(CARD, "sparse24", rows, [sample_bench()])
    card = ModelCard(once)
    assert card.data.tags == ["2:4"] and card.data.library_name == "sparsify"
    name, results = model_index_to_eval_results(card.data.to_dict()["model-index"])
    assert name == "sparse24"
    found = {(one.dataset_name, one.metric_type): one.metric_value for one in results}
    assert found == {
        ("wikitext2-test.txt", "perplexity"): 41.41, ("wikitext2-test.txt", "kl"): 0.683, ("arc_easy", "acc_norm"): 0.4,
        ("arc_easy", "recovery"): 0.8, ("hellaswag", "acc_norm"): 0.4, ("hellaswag", "recovery"): 0.8,
    }  # fmt: skip
    quoted = [
        {
            **rows[1],
            "preset": "openllm-v1",
            "tasks": {"gsm8k": {**sample_tasks()["tasks"]["arc_easy"], "task": "gsm8k"}},
        }
    ]
    data = yaml.safe_load(card_with_figures(CARD, "sparse24", quoted).split("---")[1])["model-index"][0]["results"][-1][
        "dataset"
    ]
    assert data == {"type": "openai/gsm8k", "name": "gsm8k", "config": "main", "split": "test"}
    assert once.index("## Measured") < once.index("## Recipe")
    assert "| pack | 122 MB |" in once and "| dense | 269 MB | 21.30 | 0.0000 | 50.0%" in once
    assert "80.0% (62.0 to 99.0)" in once
    assert card_with_figures(once, "sparse24", rows, [sample_bench()]) == once, "again changes nothing"
    plain = card_with_figures("# tiny\n", "tiny", [])
    assert plain.endswith("# tiny\n") and "Measured" not in plain and yaml.safe_load(plain.split("---")[1]) == {}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda place: (place / "model.safetensors").write_text("other"), "model.safetensors differs from what was written"),
        (lambda place: (place / "config.json").unlink(), "config.json is missing"),
        (lambda place: (place / "secret.txt").write_text("x"), "secret.txt is not in the manifest"),
        (lambda place: (place / "SHA256SUMS").unlink(), "has no SHA256SUMS"),
        (lambda place: place.rename(place.with_name("tiny.partial")), "is of a run that has not finished"),
    ],
)  # fmt: skip
def test_what_is_not_whole_is_refused_before_anything_is_asked(hub, finished, damage, message):
    damage(finished)
    with pytest.raises(CheckpointError, match=message):
        push(finished, "org/tiny")
    assert hub.asked == []


def test_other_refusals(hub, finished, capsys):
    with pytest.raises(SparsifyError, match="'tiny' is no name on the Hub; give ORG/NAME"):
        push(finished, "tiny")
    hub.refuses = True
    assert cli.main(["push", str(finished), "org/tiny"]) == 1
    assert "the Hub did not take it" in (said := capsys.readouterr().err) and "hf auth login" in said
    assert TOKEN not in said
