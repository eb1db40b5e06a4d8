"""Models in lm-eval, offline: against `score`, against its own class for causal models, on tasks of a local file."""

import json
import math

import pytest
import torch
from families import FAMILIES
from transformers import AutoTokenizer

from hf_diffusion import LoMDMForMaskedDiffusion, MDLMConfig, MDLMForMaskedDiffusion
from hf_diffusion.checkpoints import ARMD_SHAKESPEARE
from hf_diffusion.cli import main


lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install 'hf-diffusion[eval]')")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.evaluator import simple_evaluate  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from hf_diffusion.evaluation.lm_eval_adapter import DiffusionLM  # noqa: E402


TEXTS = ["KING HENRY.\nWhat says the lord?", "To be, or not to be: that is the question.", "O!"]
PAIRS = [("JULIET.\nO Romeo, ", "Romeo!"), ("", "the night"), ("A horse", " a kingdom for my horse"), ("What", " ho")]


def requests(kind, arguments):
    return [
        Instance(request_type=kind, doc={}, arguments=each, idx=number, metadata=("t", number, 1))
        for number, each in enumerate(arguments)
    ]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ARMD_SHAKESPEARE)


@pytest.fixture(scope="module")
def armd():
    return DiffusionLM(pretrained=ARMD_SHAKESPEARE, device="cpu", batch_size=3)


@pytest.fixture(scope="module")
def mdlm(tokenizer):
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "conditioning_size": 8}
    config = MDLMConfig(
        vocab_size=len(tokenizer) + 1, mask_token_id=len(tokenizer), max_position_embeddings=32, **shape
    )
    model = MDLMForMaskedDiffusion(config).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=0.3)
    return model


def nats(model, ids, num_given):
    """By one plain forward pass from left to right."""
    chosen = model(torch.tensor([ids])).logits.log_softmax(-1).gather(-1, torch.tensor([ids])[..., None])
    return chosen[0, num_given:].sum().item()


@torch.no_grad()
def test_conditional_likelihoods_are_those_of_a_forward_pass(armd, tokenizer):
    results = armd.loglikelihood(requests("loglikelihood", PAIRS))
    for (context, continuation), (likelihood, is_greedy) in zip(PAIRS, results, strict=True):
        kept = context.rstrip()
        given = tokenizer(kept)["input_ids"] if context else [tokenizer.eos_token_id]
        whole = tokenizer(context + continuation)["input_ids"]
        ids = whole if context else given + whole
        assert likelihood == pytest.approx(nats(armd.model, ids, len(given)), abs=1e-4)
        logits = armd.model(torch.tensor([ids])).logits[0]
        assert is_greedy == (logits.argmax(-1)[len(given) :].tolist() == ids[len(given) :])


@torch.no_grad()
def test_a_greedy_continuation_is_told(armd, tokenizer):
    context = "KING HENRY.\nWhat"
    drawn = armd.model.generate(torch.tensor([tokenizer(context)["input_ids"]]), do_sample=False, max_new_tokens=4)
    continuation = tokenizer.decode(drawn[0])[len(context) :]
    if tokenizer(context + continuation)["input_ids"] != drawn[0].tolist():
        pytest.skip("the tokenizer would spell what was drawn otherwise")
    ((_, is_greedy),) = armd.loglikelihood(requests("loglikelihood", [(context, continuation)]))
    assert is_greedy


@torch.no_grad()
def test_rolling_likelihoods_score_every_token_once(tokenizer):
    lm = DiffusionLM(pretrained=ARMD_SHAKESPEARE, device="cpu", batch_size=2, max_length=8)
    text = TEXTS[1] + TEXTS[0]
    ids, expected = tokenizer(text)["input_ids"], 0.0
    assert len(ids) > 20
    for start in range(0, len(ids), 8):
        end = min(start + 8, len(ids))
        window = [tokenizer.eos_token_id, *ids][max(end - 8, 0) : end + 1]  # nine tokens, the last ones scored
        expected += nats(lm.model, window, len(window) - (end - start))
    (likelihood,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,)]))
    assert likelihood == pytest.approx(expected, abs=1e-3)


def test_likelihoods_do_not_depend_on_the_batch_and_bounds_say_so(mdlm, tokenizer):
    for model in (mdlm, LoMDMForMaskedDiffusion.from_mdlm(mdlm)):
        results = []
        for batch_size in (1, 4):
            lm = DiffusionLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, num_draws=3)
            results.append([likelihood for likelihood, _ in lm.loglikelihood(requests("loglikelihood", PAIRS))])
            info = lm.get_model_info()["likelihood"]
            assert info["is_exact"] is False
            assert info["sampler"] == 'generate(strategy="first_hitting")'
            assert info["num_texts"] == len(PAIRS)
            assert info["nfe"] >= 3
            assert info["largest_standard_error"] > 0
        assert results[0] == pytest.approx(results[1], abs=1e-4)


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(mdlm, tokenizer):
    uniform = MDLMForMaskedDiffusion(mdlm.config).eval()  # a fresh head is zero
    lm = DiffusionLM(pretrained=uniform, tokenizer=tokenizer, num_draws=2)
    text = " ".join(TEXTS * 3)
    (likelihood,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,)]))
    assert likelihood == pytest.approx(-len(tokenizer(text)["input_ids"]) * math.log(len(tokenizer)), rel=1e-6)


def test_generation_takes_each_requests_arguments_and_stops_at_its_strings(armd, tokenizer):
    arguments = [
        ("ROMEO.\n", {"until": ["\n\n"], "max_gen_toks": 24, "strategy": "strided", "num_streams": 4}),
        ("JULIET.\nO", {"until": ["e"], "max_gen_toks": 12}),
        ("ROMEO.\n", {"until": [], "max_gen_toks": 6, "do_sample": True, "temperature": 0.7, "top_k": 5}),
        ("NURSE.\nAy,", {"until": ["e"], "max_gen_toks": 12}),
    ]
    armd.generations.update(nfe=0, num_texts=0, tokens_per_forward=0.0)
    drawn = armd.generate_until(requests("generate_until", arguments))
    ids = tokenizer(arguments[0][0], return_tensors="pt")
    expected = armd.model.generate(**ids, do_sample=False, strategy="strided", num_streams=4, max_new_tokens=24)
    whole = tokenizer.decode(expected[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert drawn[0] == whole.split("\n\n")[0]
    for text in (drawn[1], drawn[3]):
        assert "e" not in text
    info = armd.get_model_info()["generation"]
    assert info["num_texts"] == 4
    assert info["nfe"] <= 9 + 12 + 6 + 12


def test_passes_and_tokens_per_forward_are_counted(tokenizer):
    lm = DiffusionLM(pretrained=ARMD_SHAKESPEARE, device="cpu", batch_size=2, strategy="strided", num_streams=4)
    lm.diffusion_model.generation_config.eos_token_id = None
    lm.tokenizer.eos_token = lm.tokenizer.convert_ids_to_tokens(0)  # a token that is not drawn here
    drawn = lm.generate_until(requests("generate_until", [("ROMEO.\n", {"until": [], "max_gen_toks": 24})] * 2))
    assert drawn[0] == drawn[1]
    info = lm.get_model_info()["generation"]
    assert (info["nfe"], info["num_texts"], info["strategy"]) == (9, 2, "strided")
    assert info["tokens_per_forward"] == pytest.approx(24 / 9)


def test_an_adapter_of_peft_changes_what_is_scored(tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForMaskedLM

    model = AutoModelForMaskedLM.from_pretrained(ARMD_SHAKESPEARE)
    lora = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    for name, weight in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    lora.save_pretrained(tmp_path)
    request = requests("loglikelihood", PAIRS[:1])
    plain = DiffusionLM(pretrained=ARMD_SHAKESPEARE, device="cpu").loglikelihood(request)[0][0]
    adapted = DiffusionLM(pretrained=ARMD_SHAKESPEARE, peft=str(tmp_path), device="cpu").loglikelihood(request)[0][0]
    expected = DiffusionLM(pretrained=lora.eval().merge_and_unload(), tokenizer=ARMD_SHAKESPEARE).loglikelihood(request)
    assert adapted == pytest.approx(expected[0][0], abs=1e-3)
    assert abs(adapted - plain) > 0.01


def test_lm_evals_own_class_gives_the_same_likelihoods(armd):
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(ARMD_SHAKESPEARE)
    texts = [(text * 20,) for text in TEXTS]  # longer than the context
    stock = HFLM(pretrained=model, tokenizer=ARMD_SHAKESPEARE, batch_size=3, max_length=255)
    for kind, arguments in (("loglikelihood", PAIRS), ("loglikelihood_rolling", texts)):
        ours, theirs = (getattr(lm, kind)(requests(kind, arguments)) for lm in (armd, stock))
        for one, other in zip(ours, theirs, strict=True):
            if kind == "loglikelihood":
                assert one[1] == other[1]
                one, other = one[0], other[0]
            assert one == pytest.approx(other, abs=2e-3)


@pytest.fixture
def tasks(tmp_path):
    """A multiple choice, a perplexity and a generation, of one local file."""
    rows = [
        {"text": "What ho, my lord! ", "choices": ["the king", "zzqx vvk"], "answer": 0},
        {"text": "O Romeo, ", "choices": ["qqq kkzw", "my love"], "answer": 1},
        {"text": "To be, or not ", "choices": ["to be", "xxvq"], "answer": 0},
    ]
    (tmp_path / "rows.json").write_text("\n".join(json.dumps(row) for row in rows))
    shared = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path}/rows.json\ntest_split: test\n"
    metric = "metric_list:\n  - metric: {}\n    aggregation: {}\n    higher_is_better: {}\n"
    (tmp_path / "choice.yaml").write_text(
        "task: tiny_choice\noutput_type: multiple_choice\n" + shared + 'doc_to_text: "{{text}}"\n'
        'doc_to_target: answer\ndoc_to_choice: choices\ntarget_delimiter: ""\n' + metric.format("acc", "mean", "true")
    )
    (tmp_path / "rolling.yaml").write_text(
        "task: tiny_rolling\noutput_type: loglikelihood_rolling\n" + shared + 'doc_to_text: ""\n'
        'doc_to_target: "{{text}}"\n' + metric.format("bits_per_byte", "bits_per_byte", "false")
    )
    (tmp_path / "until.yaml").write_text(
        "task: tiny_until\noutput_type: generate_until\n" + shared + 'doc_to_text: "{{text}}"\n'
        'doc_to_target: "{{choices[answer]}}"\ngeneration_kwargs:\n  until: ["\\n"]\n  max_gen_toks: 8\n'
        + metric.format("exact_match", "mean", "true")
    )
    return tmp_path


@pytest.fixture(autouse=True)
def no_shared_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def test_tasks_of_a_local_file_by_the_name_that_is_registered(tasks, tokenizer):
    results = simple_evaluate(
        model="hf-diffusion",
        model_args={"pretrained": ARMD_SHAKESPEARE},
        device="cpu",
        tasks=["tiny_choice", "tiny_rolling", "tiny_until"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )
    assert results["results"]["tiny_choice"]["acc,none"] == 1
    texts = ["What ho, my lord! ", "O Romeo, ", "To be, or not "]
    model = FAMILIES["armd"].model_class.from_pretrained(ARMD_SHAKESPEARE)
    total = sum(nats(model, [tokenizer.eos_token_id, *tokenizer(text)["input_ids"]], 1) for text in texts)
    expected = -total / math.log(2) / sum(len(text.encode()) for text in texts)
    assert results["results"]["tiny_rolling"]["bits_per_byte,none"] == pytest.approx(expected, rel=1e-4)
    config = results["config"]
    assert config["likelihood"]["is_exact"] is True
    assert config["generation"]["num_texts"] == 3
    assert config["generation"]["nfe"] <= 24


def test_the_command_writes_results_and_goes_on_after_an_interruption(tasks, capsys, monkeypatch):
    output = tasks / "out.json"
    flags = ["evaluate", "--tasks", "tiny_choice", "--include-path", str(tasks), "--json", str(output)]
    flags += ["--batch-size", "1", "--strategy", "strided", "--num-streams", "1"]
    model_class = FAMILIES["armd"].model_class
    score, calls = model_class.score, []

    def interrupted_once(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return score(self, *args, **kwargs)

    monkeypatch.setattr(model_class, "score", interrupted_once)
    assert main(flags) == 130
    assert not output.exists()
    with monkeypatch.context() as patched:
        patched.setattr("hf_diffusion.cli.evaluate.environment", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(flags) == 130
    assert len(calls) == 4 + 3  # six requests, of which three were finished
    assert main(flags) == 0
    assert len(calls) == 4 + 3
    written = json.loads(output.read_text())
    assert written["results"]["tiny_choice"]["acc,none"] == 1
    assert written["config"]["likelihood"]["sampler"] == 'generate(strategy="strided", num_streams=1)'
    assert (written["config"]["likelihood"]["num_texts"], written["config"]["likelihood"]["nfe"]) == (6, 6)
    assert written["environment"]["torch"] == torch.__version__
    assert "tiny_choice" in capsys.readouterr().out
    assert [path.name for path in tasks.glob("out.json*")] == ["out.json"]


def test_what_does_not_fit_is_refused(mdlm, tokenizer):
    with pytest.raises(ValueError, match="`max_length` .32. must be less than the model's context .32."):
        DiffusionLM(pretrained=mdlm, tokenizer=tokenizer, max_length=32)
    other = torch.nn.Linear(1, 1)
    other.device, other.config, other.tie_weights = torch.device("cpu"), mdlm.config, lambda: None
    with pytest.raises(ValueError, match="is a Linear, no masked-diffusion model"):
        DiffusionLM(pretrained=other, tokenizer=tokenizer)
