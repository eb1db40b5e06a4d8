"""What someone else does with exported folders, in a process of its own: load them and note what the models answer.

    python hub_visitor.py ANSWERS with|without|hub NAME...

`without` makes sure that `hf_diffusion` cannot be imported, wherever it is installed. So does `hub`, for which NAME is
that of a repository; NAME@BRANCH is loaded with a token. For the others it is a folder.
"""

import builtins
import contextlib
import io
import json
import sys
from pathlib import Path

import torch
from hub_stand_in import TOKEN


PROMPT = torch.tensor([[5, 11, 2], [7, 1, 9]])


class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_diffusion":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def auto_names(folder):
    import transformers

    names = json.loads((Path(folder) / "config.json").read_text())["auto_map"]
    return sorted(name for name in names if name.startswith("AutoModel") and hasattr(transformers, name))


def answers(folder, auto_name, **loading):
    """Where the class is from, and what the model makes of a prompt: logits, and texts by two strategies."""
    import transformers

    model = getattr(transformers, auto_name).from_pretrained(folder, **loading).eval()
    settings = json.loads((Path(folder) / "strategies.json").read_text())
    if type(model).__name__.endswith("ForCausalLM"):
        settings = [{"do_sample": False}, {"do_sample": True}]
    texts = []
    for setting in settings:
        torch.manual_seed(3)
        texts.append(model.generate(PROMPT, max_new_tokens=6, **setting))
    with torch.no_grad():
        logits = model(PROMPT).logits
    return {
        "module": type(model).__module__,
        "config_is_of_the_model": type(model.config) is type(model).config_class,
        "logits": logits,
        "texts": texts,
    }


def main(file, package, names):
    if package == "with":
        import hf_diffusion  # noqa: F401

        found = answers_of_folders(names)
    else:
        sys.meta_path.insert(0, Absent())
        builtins.input = lambda question="": sys.exit(f"Nobody is there to be asked: {question}")
        if package == "hub":
            found = {name: from_hub(name) for name in names}
        else:
            found = answers_of_folders(names, trust_remote_code=True) | others_than_answers(names)
    torch.save(found, file)


def answers_of_folders(folders, **loading):
    return {(folder, name): answers(folder, name, **loading) for folder in folders for name in auto_names(folder)}


def run_card(folder):
    """The text that the first example in a model card prints, if it runs as it stands."""
    example = (Path(folder) / "README.md").read_text().split("```python\n")[1].split("```")[0]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(example, {})
    return printed.getvalue()


def from_hub(name):
    """Logits, or what the error says."""
    import transformers

    repo_id, _, branch = name.partition("@")
    access = {"revision": branch, "token": TOKEN} if branch else {}
    try:
        model = transformers.AutoModel.from_pretrained(repo_id, trust_remote_code=True, **access)
    except OSError as error:
        return str(error)
    with torch.no_grad():
        return model(PROMPT).logits


def others_than_answers(folders):
    """Saving a loaded model again, loading without the word that allows it to run code, and what a card says."""
    import transformers

    found = {"card": run_card("shipped")}
    for folder in folders:
        model = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)
        model.save_pretrained(folder + "-again")
        model.save_pretrained(folder + "-as-asked", include_code=True)
    try:
        transformers.AutoModel.from_pretrained(folders[0], trust_remote_code=False)
    except ValueError as error:
        found["untrusted"] = str(error)
    return found


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
