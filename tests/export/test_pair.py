"""Bundles of a target and its draft: written, opened by their runtimes, certified, verified again."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pair_models import save_draft, save_target, set_json

from edgewright.bench import bench
from edgewright.errors import BadInput, EdgewrightError, GateFailed, RecipeError, Unsafe
from edgewright.export import export
from edgewright.export.artifact import Artifact, read_entry
from edgewright.export.pair import prompts_for
from edgewright.export.pairs import certify as certifying
from edgewright.export.pairs.bundle import bundle_of
from edgewright.export.pairs.noise import judged
from edgewright.export.parity import verify
from edgewright.export.runtimes import open_session
from edgewright.export.runtimes.openvino import EXACT
from edgewright.export.runtimes.pair import PairSession
from edgewright.export.runtimes.spinning import STOP_SPINNING
from edgewright.export.weight_hash import weights_sha256
from edgewright.generate import generate
from edgewright.speculative.counts import Counts

pytest.importorskip("onnxruntime_genai")
pytest.importorskip("openvino_genai")
pytest.importorskip("llama_cpp")

WIDTHS = {"genai": "fp32", "openvino": "fp32", "gguf": "f32", "hf": "fp32"}
PROMPT = "def add(a, b):\n    return "


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_target(tmp_path_factory.mktemp("pair") / "target")


@pytest.fixture(scope="module")
def draft(target: Path) -> Path:
    return save_draft(target, target.parent / "draft")


@pytest.fixture(scope="module")
def bundle(target: Path, draft: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Artifact]:
    """The certified bundle of a runtime, made once; a test must not change it."""
    made: dict[str, Artifact] = {}

    def of(to: str) -> Artifact:
        if to not in made:
            out = tmp_path_factory.mktemp("bundles") / to
            made[to] = export(target, to=to, quant=WIDTHS[to], out=out, draft=draft, gamma=3, threads=1)
        return made[to]

    return of


@pytest.mark.parametrize("to", WIDTHS)
def test_a_bundle_is_certified_in_its_runtime(bundle: Callable[[str], Artifact], target: Path, to: str) -> None:
    artifact = bundle(to)
    pair = artifact.pair
    assert pair is not None and artifact.gate == "passed"
    assert pair["token_identity"] == 1 and pair["divergences"] == []
    assert 0.2 < pair["acceptance_rate"] < 1, "the draft should agree now and then, and not always"
    # In float32 the runtime accepts what the checkpoints' own loop does. What counts as drafted at the end of a text,
    # and whether the prompt's pass drafts, differs a little from runtime to runtime.
    assert pair["acceptance_rate"] == pytest.approx(pair["checkpoint_acceptance"], rel=0.1) and not pair["alarm"]
    assert 2 < pair["drafted_per_round"] <= 3
    assert pair["block_efficiency"] == pytest.approx(1 + pair["drafted_per_round"] * pair["acceptance_rate"])
    assert 0 < pair["cost_ratio"] < 1 and pair["mbsu"] > 0 and pair["speedup"] > 0
    assert pair["peak_memory"] > 20_000_000
    entry = read_entry(artifact.path)
    assert entry is not None and entry["kind"] == "pair" and entry["pair"]["gate"] == "passed"
    assert entry["made_from"]["sha256"] != entry["draft"]["made_from"]["sha256"]
    assert entry["bytes"] == artifact.bytes and entry["gamma"] == 3


@pytest.mark.parametrize("to", WIDTHS)
def test_a_bundle_opens_as_one_model(bundle: Callable[[str], Artifact], to: str) -> None:
    path = bundle(to).path
    with open_session(path, threads=1) as session:
        assert isinstance(session, PairSession)
        prompt = [session.start_id, *session.tokenize(PROMPT)]
        plain = session.target.native_generate(prompt, 24)
        assert session.target.drafted is None
        assert session.native_generate(prompt, 24) == plain
        assert session.drafted is not None and session.drafted.drafted > 0
        few = session.drafted.rounds
        session.native_generate(prompt, 24, gamma=1)
        assert session.drafted.rounds >= few and session.drafted.gamma <= 1
        rows = session.append(prompt, "all")
        assert rows is not None and rows.shape == (len(prompt), session.vocab_size)
        assert int(np.argmax(rows[-1])) == plain[0]
    assert generate(path, PROMPT, max_new_tokens=8, threads=1).tokens == tuple(plain[:8])


def test_genai_opens_the_bundle_unchanged(bundle: Callable[[str], Artifact]) -> None:
    import onnxruntime_genai as og

    path = bundle("genai").path
    model = og.Model(str(path))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=60)
    generator = og.Generator(model, parameters)
    generator.append_tokens(og.Tokenizer(model).encode(PROMPT))
    sections = json.loads((path / "genai_config.json").read_text())["model"]
    assert all(sections[name]["session_options"].items() >= STOP_SPINNING.items() for name in ("decoder", "draft"))
    while not generator.is_done():
        generator.generate_next_token()
    stats = generator.get_speculative_stats()
    assert stats["effective_k"] == 3 and stats["draft_tokens_accepted"] > 0


def test_transformers_drafts_as_the_files_say(bundle: Callable[[str], Artifact]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = bundle("hf").path
    draft = AutoModelForCausalLM.from_pretrained(path / "draft")
    settings = draft.generation_config
    assert (settings.num_assistant_tokens, settings.assistant_confidence_threshold) == (3, 0)
    target = AutoModelForCausalLM.from_pretrained(path / "target")
    prompt = AutoTokenizer.from_pretrained(path / "target")(PROMPT, return_tensors="pt")["input_ids"]
    mask = torch.ones_like(prompt)
    plain = target.generate(prompt, attention_mask=mask, max_new_tokens=20, do_sample=False, pad_token_id=0)
    asked: list[int] = []
    target.register_forward_pre_hook(
        lambda model, inputs, given: asked.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    helped = target.generate(
        prompt, attention_mask=mask, max_new_tokens=20, do_sample=False, pad_token_id=0, assistant_model=draft
    )
    assert torch.equal(plain, helped)
    assert len(asked) < 20 and max(asked[1:]) == 4
    assert json.loads((path / "vllm.json").read_text()) == {
        "method": "draft_model", "model": "draft", "num_speculative_tokens": 3,
    }  # fmt: skip


def test_transformers_own_requests_are_no_warning(
    bundle: Callable[[str], Artifact], caplog: pytest.LogCaptureFixture
) -> None:
    """What it passes to a draft it calls deprecated itself."""
    from transformers.generation import utils

    utils.logger.warning_once.cache_clear()
    with caplog.at_level("WARNING"), open_session(bundle("hf").path, threads=1) as session:
        utils.logger.addHandler(caplog.handler)
        try:
            session.native_generate([session.start_id, 5, 6], 6)
        finally:
            utils.logger.removeHandler(caplog.handler)
    assert [record.getMessage() for record in caplog.records] == []


@pytest.mark.slow
@pytest.mark.parametrize("to", ["hf", "openvino"])
def test_launch_scripts_run(bundle: Callable[[str], Artifact], to: str) -> None:
    path = bundle(to).path
    shown = [
        subprocess.run(
            [sys.executable, str(path / "launch.py"), PROMPT, *more], capture_output=True, text=True, check=True
        ).stdout
        for more in ([], ["5"])
    ]
    assert 0 < len(shown[1]) < len(shown[0])


@pytest.mark.parametrize("to", WIDTHS)
def test_launch_files_name_what_is_there(bundle: Callable[[str], Artifact], to: str) -> None:
    path = bundle(to).path
    text = (path / "LAUNCH.md").read_text()
    parts = [read_entry(path)["target"], read_entry(path)["draft"]["path"]]  # type: ignore[index]
    assert all(part in text and (path / part).exists() for part in parts)
    script = path / "launch.py"
    if script.exists():
        compile(script.read_text(), str(script), "exec")
    assert script.exists() == (to in ("openvino", "hf"))
    if to == "openvino":
        assert all(f'"{key}": "{value}"' in script.read_text() for key, value in EXACT.items()), "as it was certified"
    if to == "gguf":
        assert "--spec-draft-n-max 3" in text and f"-m {parts[0]} -md {parts[1]}" in text


def test_a_bundle_is_verified_again(bundle: Callable[[str], Artifact], target: Path, draft: Path) -> None:
    found = verify(bundle("gguf").path, against=target, draft=draft, threads=1)
    assert found.gate == "passed" and found.pair is not None
    assert found.pair["acceptance_rate"] == bundle("gguf").pair["acceptance_rate"]  # type: ignore[index]


def test_training_prompts_and_agreement_are_what_a_pair_is_held_against(
    target: Path, draft: Path, tmp_path: Path
) -> None:
    """draft.json's prompts are decoded, kept in the manifest and decoded again; another agreement there is an alarm."""
    trained = Path(shutil.copytree(draft, tmp_path / "draft"))
    prompts = [[5, 6, 7, 8], [9, 10, 11], [12] * 256]

    def pair(agreement: float, sha256: str) -> dict[str, Any]:
        record = {"agreement": agreement, "target_sha256": sha256, "prompts": prompts}
        (trained / "draft.json").write_text(json.dumps(record))
        made = export(target, to="gguf", quant="f32", out=tmp_path / "pair", draft=trained, threads=1)
        assert made.pair is not None
        return made.pair

    other = pair(0.5, "of another target")
    assert other["trained_agreement"] is None and not other["alarm"] and other["prompts"] > len(prompts)
    far = pair(0.5, weights_sha256(target))
    assert far["prompts"] == len(prompts) and far["trained_agreement"] == 0.5
    assert far["alarm"] and any("at the end of training" in note for note in far["warnings"])
    near = pair(far["checkpoint_agreement"], weights_sha256(target))
    assert not near["alarm"] and 0 < near["checkpoint_agreement"] < 1
    entry = read_entry(tmp_path / "pair")
    assert entry is not None and [prompt[1:] for prompt in entry["prompts"][:2]] == prompts[:2]
    assert entry["prompts"][2][1:] == [12] * (256 - certifying.NEW_TOKENS - 1), (
        "the end that leaves room in the context"
    )
    again = verify(tmp_path / "pair", against=target, threads=1).pair
    assert again is not None and again["prompts"] == len(prompts)
    assert again["trained_agreement"] == near["trained_agreement"] and not again["alarm"]


def test_a_draft_that_was_exchanged_is_found(
    bundle: Callable[[str], Artifact], target: Path, draft: Path, tmp_path: Path
) -> None:
    place = Path(shutil.copytree(bundle("gguf").path, tmp_path / "bundle"))
    other = save_draft(target, tmp_path / "other", change=lambda model: model.lm_head.weight.mul_(-1))
    export(other, to="gguf", quant="f32", out=tmp_path / "other.gguf", verify=False)
    shutil.copy(tmp_path / "other.gguf", place / "draft-f32.gguf")
    found = verify(place, against=target, draft=draft, threads=1)
    assert found.gate == "failed" and any(reason.startswith("the draft:") for reason in found.reasons)


def test_bench_shows_the_pair_and_its_target(bundle: Callable[[str], Artifact]) -> None:
    path = bundle("gguf").path
    report = bench(path, prompt=4, generate=4, repeats=1, threads=1)
    assert [row.artifact.path for row in report.artifacts] == [path / "target-f32.gguf", path]
    assert [row.artifact.gate for row in report.artifacts] == ["passed", "passed"]


# ---------------------------------------------------------------- the gate can fail


def test_wrong_tokens_leave_no_folder(
    target: Path, draft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loop that takes one drafted token too many, as a broken cache would make it."""
    original = PairSession.native_generate

    def wrong(self: PairSession, tokens: Any, count: int, **settings: Any) -> list[int]:
        found = original(self, tokens, count, **settings)
        return [*found[:5], (found[5] + 1) % self.vocab_size, *found[6:]] if len(found) > 5 else found

    monkeypatch.setattr(PairSession, "native_generate", wrong)
    with pytest.raises(GateFailed, match="rounding does not explain") as caught:
        export(target, to="gguf", quant="f32", out=tmp_path / "out" / "pair", draft=draft, threads=1)
    assert caught.value.code == "EW-830"
    assert not (tmp_path / "out").exists()


def test_openvino_rounds_activations_otherwise_in_its_pipelines(target: Path, tmp_path: Path) -> None:
    """Its sessions give the same logits in pieces of any width: so they cannot show it."""
    path = export(target, to="openvino", quant="int8", out=tmp_path / "int8", verify=False).path
    with open_session(path, threads=1) as session:
        prompt = [session.start_id, *session.tokenize(PROMPT)]
        plain = session.native_generate(prompt, 24)
        other = [*plain[:-1], (plain[-1] + 1) % session.vocab_size]
        found = judged(session, prompt, plain, other, 4)
    assert found.position == 23 and 0 < found.noise < 1 and not found.within_noise


def test_a_runtime_that_never_drafts_fails(bundle: Callable[[str], Artifact], monkeypatch: pytest.MonkeyPatch) -> None:
    path = bundle("gguf").path  # certified before the runtime is made to fail

    def alone(self: PairSession, tokens: Any, count: int, **settings: Any) -> list[int]:
        found = self.target.native_generate(tokens, count)
        self.drafted = Counts(rounds=len(found))
        return found

    monkeypatch.setattr(PairSession, "native_generate", alone)
    with open_session(path, threads=1) as session:
        assert isinstance(session, PairSession)
        prompts = certifying.built_in_prompts(session)[:2]
        expected = certifying.Expected(checkpoint_acceptance=0.5)
        found = certifying.certify(session, prompts, cost_ratio=0.5, expected=expected, peak_memory=None)
    assert found.gate == "failed" and "never drafted" in found.reasons[0]


def test_another_acceptance_than_the_checkpoints_raises_the_alarm(bundle: Callable[[str], Artifact]) -> None:
    with open_session(bundle("gguf").path, threads=1) as session:
        assert isinstance(session, PairSession)
        prompts = certifying.built_in_prompts(session)[:3]
        measure = {"cost_ratio": 0.5, "peak_memory": None}
        unknown = certifying.Expected()
        rate = certifying.certify(session, prompts, expected=unknown, **measure).acceptance_rate  # type: ignore[arg-type]
        assert rate is not None
        near, far, elsewhere = (
            certifying.certify(session, prompts, expected=expected, **measure)  # type: ignore[arg-type]
            for expected in (
                certifying.Expected(checkpoint_acceptance=rate / 1.09),
                certifying.Expected(checkpoint_acceptance=rate / 1.11),
                certifying.Expected(checkpoint_acceptance=rate, checkpoint_agreement=0.3, trained_agreement=0.6),
            )
        )
    assert not near.alarm and far.alarm, "few drafted tokens tell an acceptance near 1 well"
    assert elsewhere.alarm and "at the end of training it was 60.0%" in elsewhere.warnings[0]
    assert any("ALARM" in warning for warning in far.warnings) and far.gate == "passed"


def test_a_user_s_files_are_taken_evenly(bundle: Callable[[str], Artifact], tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("".join(f"one {number}\n" for number in range(40)))
    (tmp_path / "short.txt").write_text("two\n")
    found = bundle_of(bundle("gguf").path)
    assert found is not None
    with open_session(found.path, threads=1) as session:
        texts = [session.detokenize(prompt[1:]) for prompt in prompts_for(found, None, [tmp_path / "*.txt"], 1)]
    assert texts == ["one 0", "two", *(f"one {number}" for number in range(1, 15))]


@pytest.mark.parametrize(
    ("accepted", "drafted", "expected", "alarm"),
    [(29, 400, 0.0551, False), (290, 4000, 0.0551, True), (222, 400, 0.5, False), (2220, 4000, 0.5, True)],
)
def test_chance_raises_no_alarm(accepted: int, drafted: int, expected: float, alarm: bool) -> None:
    assert certifying.differs(accepted / drafted, expected, drafted) is alarm


# ---------------------------------------------------------------- bundles from elsewhere


def test_a_draft_of_another_bundle_is_refused(bundle: Callable[[str], Artifact]) -> None:
    with (
        open_session(bundle("genai").path / "target", threads=1) as session,
        open_session(bundle("gguf").path / "draft-f32.gguf", threads=1) as foreign,
    ):
        with pytest.raises(BadInput) as caught:
            session.native_generate([session.start_id], 4, draft=foreign)
        assert caught.value.code == "EW-604"
        with pytest.raises(BadInput) as caught:
            session.native_generate([session.start_id], 4, draft=session)
        assert caught.value.code == "EW-605"


def outside(place: Path) -> None:
    manifest = json.loads((place / "edgewright.json").read_text())
    manifest["artifacts"]["."]["draft"]["path"] = "../elsewhere"
    (place / "edgewright.json").write_text(json.dumps(manifest))


def linked(place: Path) -> None:
    shutil.move(place / "draft", place.parent / "moved")
    (place / "draft").symlink_to(place.parent / "moved")


def scripted(place: Path) -> None:
    (place / "more.py").write_text("print()")


def deep(place: Path) -> None:
    (place / "draft" / "custom.py").write_text("print()")


def other_options(place: Path) -> None:
    content = json.loads((place / "genai_config.json").read_text())
    content["model"]["draft"]["session_options"] = {"provider_options": [{"cuda": {}}]}
    (place / "genai_config.json").write_text(json.dumps(content))


def many_drafts(place: Path) -> None:
    set_json(place / "genai_config.json", speculative={"max_draft_tokens": 17})


def climbing(place: Path) -> None:
    content = json.loads((place / "genai_config.json").read_text())
    content["model"]["draft"]["filename"] = "../draft/model.onnx"
    (place / "genai_config.json").write_text(json.dumps(content))


def foreign_prompts(place: Path) -> None:
    manifest = json.loads((place / "edgewright.json").read_text())
    manifest["artifacts"]["."]["prompts"] = [[-1]]
    (place / "edgewright.json").write_text(json.dumps(manifest))


def no_gamma(place: Path) -> None:
    manifest = json.loads((place / "edgewright.json").read_text())
    del manifest["artifacts"]["."]["gamma"]
    (place / "edgewright.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "kind", "code"),
    [
        (outside, Unsafe, "EW-331"),
        (linked, Unsafe, "EW-316"),
        (scripted, Unsafe, "EW-314"),
        (deep, Unsafe, "EW-314"),
        (other_options, BadInput, "EW-828"),
        (many_drafts, BadInput, "EW-828"),
        (climbing, Unsafe, "EW-331"),
        (no_gamma, BadInput, "EW-829"),
        (foreign_prompts, BadInput, "EW-829"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_hostile_bundle_is_refused(
    bundle: Callable[[str], Artifact], tmp_path: Path, damage: Callable[[Path], None], kind: type, code: str
) -> None:
    place = Path(shutil.copytree(bundle("genai").path, tmp_path / "bundle"))
    damage(place)
    with pytest.raises(EdgewrightError) as caught, open_session(place, threads=1) as session:
        session.native_generate([session.start_id], 4)
    assert isinstance(caught.value, kind) and caught.value.code == code


# ---------------------------------------------------------------- drafts of every kind


def ternarize(model: Any) -> None:
    """Absmean ternary, one scale a tensor, which half precision holds."""
    import torch

    for name, weight in model.named_parameters():
        if "_proj" in name:
            scale = weight.abs().mean().to(torch.bfloat16).float()
            weight.copy_((weight / scale).round().clamp(-1, 1) * scale)


def adapt(model: Any) -> None:
    """LoRA, as a draft that was aligned has it, merged into the weights."""
    import torch
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    model.model = adapted.merge_and_unload().model


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's
@pytest.mark.parametrize(
    ("change", "widths"),
    [
        (ternarize, {"genai": ("int8", "ternary"), "openvino": ("int8", "ternary"), "hf": ("fp32", "ternary")}),
        (None, {"genai": ("int8", "int4"), "gguf": ("q8_0", "q4_0"), "openvino": ("int8", "int4")}),
        (adapt, {"genai": ("fp32", "fp32"), "gguf": ("f16", "q8_0")}),
    ],
    ids=["ternary", "int4", "lora"],
)
def test_drafts_of_every_kind_are_certified(
    target: Path, tmp_path: Path, change: Any, widths: dict[str, tuple[str, str]]
) -> None:
    draft = save_draft(target, tmp_path / "draft", change=change)
    for to, (quant, draft_quant) in widths.items():
        made = export(target, to=to, quant=quant, draft=draft, draft_quant=draft_quant, out=tmp_path / to, threads=1)
        assert made.gate == "passed" and made.pair is not None and made.pair["acceptance_rate"] > 0.1
        assert made.pair["draft_quant"] == draft_quant


def test_a_graph_that_openvino_cannot_page_is_refused_before_it_decodes(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    target, draft = tiny_model("gpt2"), tmp_path / "draft"
    shutil.copytree(target, draft)
    model = AutoModelForCausalLM.from_pretrained(target)
    model.transformer.h, model.config.n_layer = model.transformer.h[:1], 1
    model.save_pretrained(draft)
    with pytest.raises(RecipeError, match="attention_mask") as caught:
        export(target, to="openvino", quant="fp32", out=tmp_path / "pair", draft=draft, verify=False)
    assert caught.value.code == "EW-833"
    assert list(tmp_path.iterdir()) == [draft]
