"""Uploads to a stand-in of the Hub, by the owner of a model; and what others get from there, without the package."""

import json

import hub_owner
import hub_visitor
import pytest
import torch
from elsewhere import run_elsewhere
from families import FAMILIES
from hub_stand_in import TOKEN, HubStandIn
from huggingface_hub import ModelCard


@pytest.fixture(scope="module")
def model():
    return FAMILIES["armd"].model()


@pytest.fixture(scope="module")
def hub():
    with HubStandIn() as hub:
        yield hub


@pytest.fixture(scope="module")
def owner(hub, model, tmp_path_factory):
    """The owner has uploaded. What was reported, and the folder in which it happened."""
    home = tmp_path_factory.mktemp("owner")
    model.save_pretrained(home / "model")
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    run_elsewhere(hub_owner, "report", "model", home=home, **settings)
    return json.loads((home / "report").read_text()), home


@pytest.fixture(scope="module")
def visitor(hub, owner, tmp_path_factory):
    home = tmp_path_factory.mktemp("visitor")
    names = ["owner/private", "owner/private@main", "owner/private@second"]
    run_elsewhere(hub_visitor, "found", "hub", *names, home=home, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0")
    return torch.load(home / "found")


def card(hub, repo_id, revision="main"):
    return ModelCard(hub.files(repo_id, revision)["README.md"].decode())


class TestUpload:
    def test_the_command_uploads_the_folder_that_it_writes(self, hub, owner):
        report, home = owner
        assert report["export"] == 0
        written = {file.name: file.read_bytes() for file in (home / "exported").iterdir()}
        assert hub.files("owner/exported") == written
        assert 'from_pretrained("owner/exported", trust_remote_code=True)' in card(hub, "owner/exported").text

    def test_a_model_uploads_its_code_and_its_card(self, hub, owner):
        exported, pushed = hub.files("owner/exported"), hub.files("owner/private")
        assert {*pushed} == {*exported}
        assert all(pushed[name] == exported[name] for name in pushed if name.endswith(".py"))
        assert (hub.repositories["owner/private"].private, hub.repositories["owner/exported"].private) == (True, False)
        assert "Letters." in card(hub, "owner/private").text
        assert "first" in card(hub, "owner/private").data.tags

    def test_a_card_on_the_hub_stays_but_for_tags(self, hub, owner):
        kept = card(hub, "owner/private", "second")
        assert kept.text == card(hub, "owner/private").text
        assert {"first", "later"} <= {*kept.data.tags}
        assert kept.data.license is None

    def test_an_interrupted_upload_commits_nothing_and_says_so(self, hub, owner):
        report, _ = owner
        assert "owner/private" in report["cut"]
        assert "Nothing has been committed. Try again." in report["cut"]
        start, end = (hub.requests.index(f"PUT /cut/{whether}") for whether in ("yes", "no"))
        cut = hub.requests[start:end]
        assert any(request.startswith("PUT /large/") for request in cut)
        assert not any("/commit/" in request for request in cut)
        assert "POST /api/models/owner/private/commit/main" in hub.requests[end:]

    def test_a_token_without_the_right_is_told_so(self, owner):
        report, _ = owner
        assert "`repo_id`='owner/private'" in report["forbidden"]
        assert "hf auth login" in report["forbidden"]


class TestDownload:
    def test_the_model_comes_back(self, model, visitor):
        with torch.no_grad():
            torch.testing.assert_close(
                visitor["owner/private@main"], model(hub_visitor.PROMPT).logits, rtol=1e-5, atol=1e-5
            )

    def test_a_branch_is_a_model_of_its_own(self, visitor):
        assert not torch.allclose(visitor["owner/private@second"], visitor["owner/private@main"])

    def test_a_private_model_without_a_token_is_an_error_with_a_remedy(self, visitor):
        assert "owner/private" in visitor["owner/private"]
        assert "hf auth login" in visitor["owner/private"]
