"""What a study of memory and speed refuses: every wrong label in one line, with its line in the file and the mend."""

from __future__ import annotations

import re
from pathlib import Path

import efficiency_data as data
import pytest
from harness.efficiency.order import Lengths
from harness.efficiency.spec import load_efficiency, variant_name
from harness.reporting.efficiency.published_table import check_published
from harness.study.strict_yaml import ConfigError

GRASS = "{kind: memory-ratio, method: grass, against: lisa-keep, settings: plain, shape: 1x1024,"
BESIDE = "{method: grass-decoder, options: {offload: resident}, settings: lean, shape: 4x1024}"


def replaced(text: str, old: str, new: str) -> tuple[str, str]:
    """An edit of a part of a line."""
    assert old in text, old
    return text, text.replace(old, new)


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (("cuda: llama-2-7b", "cuda: llama-2-7"), "anchor.cuda: there is no model llama-2-7: did you"),
        (("cpu: tiny}", "cpu: tini}"), "anchor.cpu: there is no model tini: did you mean tiny?"),
        (("compared: [lora, grass,", "compared: [lora, gras,"), "compared.1: there is no method gras: did you mean"),
        (("  - {settings: lean, shape: 1x1024}", "  - {settings: leen, shape: 1x1024}"),
         "corners.1.settings: there is no setting leen: did you mean lean?"),
        (("  - {settings: lean, shape: 1x1024}", "  - {settings: lean, shape: 2x1024}"),
         "corners.1.shape: there is no shape 2x1024: did you mean"),
        (replaced(BESIDE, "grass-decoder", "decoder"), "order.0.beside.0.method: there is no method decoder: did you"),
        (replaced(BESIDE, "lean", "plain"), "order.0.beside.0: these settings and shape are none of the corners"),
        (replaced(BESIDE, "offload", "offlod"),
         "order.0.beside.0.options.offlod: the method grass-decoder has no such option: did you mean offload?"),
        (replaced(BESIDE, "resident", "residnt"), "order.0.beside.0.options.offload: must be 'auto', 'resident' or"),
        (replaced(BESIDE, "{offload: resident}", "{}"), "order.0.beside.0.options: at least 1 wanted, given 0"),
        (("methods: [grass, grass-decoder]", "methods: [grass, full]"),
         "order.1.options.active_layers: the method full has no such option: it has none"),
        (("methods: [grass, grass-decoder]", "methods: [grass, grsss]"), "order.1.methods.1: there is no method"),
        (("{active_layers: 4}", "{active_layers: [4]}"),
         "order.1.options.active_layers: one word or number is wanted here, not [4]"),
        (("models: [gemma-2b,", "models: [gemma2b,"), "order.2.models.0: there is no model gemma2b: did you"),
        (("settings: [plain, lean], tokens", "settings: [plain, loan], tokens"),
         "order.3.settings.1: there is no setting loan: did you mean lean?"),
        (("tokens: [1792, 256,", "tokens: [1792, 1,"), "order.3.tokens.1: must be above 1, not 1"),
        (("{kind: everything}", "{kind: everthing}"),
         "order.5.kind: must be one of 'corners', 'variants', 'lengths', 'everything', not 'everthing'"),
        (("reference: lora\n", "reference: lra\n"), "reference: there is no method lra: did you mean lora?"),
        (("more_references: [full]", "more_references: [ful]"), "more_references.0: there is no method ful: did you"),
        (("resident: {offload: resident}\n", "resident: {ofload: resident}\n"),
         "resident.ofload: no method here has such an option: did you mean offload?"),
        (("resident: {offload: resident}\n", "resident: {offload: residnt}\n"), "resident.offload: must be"),
        (("resident: {offload: resident}\n", "resident: {}\n"), "targets.15: an overhead is one against `resident`"),
        (("{kind: overhead, method: grass-decoder", "{kind: overhead, method: lora"),
         "targets.15.method: lora has no option offload, which `resident` names: it is one of grass, grass-decoder"),
        (replaced(GRASS, "method: grass", "method: gras"), "targets.5.method: there is no method gras: did you mean"),
        (replaced(GRASS, "lisa-keep", "lisa-keeps"), "targets.5.against: there is no method lisa-keeps: did you mean"),
        (replaced(GRASS, "plain", "plan"), "targets.5.settings: there is no setting plan: did you mean plain?"),
        (replaced(GRASS, "1x1024", "1x1023"), "targets.5.shape: there is no shape 1x1023: did you mean 1x1024?"),
        (replaced(GRASS, "memory-ratio", "memory"), "targets.5.kind: must be one of 'memory-ratio', 'peak', 'speed-ra"),
        (("{kind: peak, method: grass-decoder, model: gemma-2b", "{kind: peak, method: grass-decoder, model: gema"),
         "targets.7.model: there is no model gema: did you mean gemma-2b?"),
        (("paper: 1.08, parity", "paper: 1.08, party"), "targets.9.party: unknown key; did you mean 'parity'?"),
        (("  settings: plain\n  metrics", "  settings: plane\n  metrics"),
         "published.settings: there is no setting plane: did you mean plain?"),
        (("settings: [plain, lean]}\n  models", "settings: [plain, leen]}\n  models"),
         "published.metrics.throughput_ratio.settings.1: there is no setting leen: did you mean lean?"),
        (("peak_memory: {batch", "peek_memory: {batch"), "published.metrics.peek_memory: must be 'peak_memory' or 'th"),
        (("gemma-2b: gemma-2b,", "gemma-2b: gemma-b,"), "published.models.gemma-2b: there is no model gemma-b: did"),
        (("unnamed: llama-2-7b", "unnamed: llama"), "published.unnamed: there is no model llama: did you mean"),
        (("{lisa: [lisa, lisa-keep]}", "{lisa: [lisa, liza]}"), "published.methods.lisa.1: there is no method liza:"),
    ],
)  # fmt: skip
def test_a_wrong_label_is_refused_in_one_line(edit: tuple[str, str], complaint: str, tmp_path: Path) -> None:
    path = data.study_file(tmp_path, edit)
    before, after = ((data.ROOT / "config/efficiency.yaml").read_text().splitlines(), path.read_text().splitlines())
    lines = [i for i, (old, new) in enumerate(zip(before, after, strict=True), start=1) if old != new]
    with pytest.raises(ConfigError) as caught:
        load_efficiency(path)
    said = str(caught.value)
    assert "\n" not in said
    number, _, rest = said.removeprefix(f"{path}:").partition(": ")
    assert rest.startswith(complaint), said
    # without `resident` it is the goal that wants it which is named
    assert int(number) in lines or "against `resident`" in said


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (("{tinyllama: tinyllama-1.1b", "{tinylama: tinyllama-1.1b"),
         "published.models.tinylama: the published numbers have no model tinylama: did you mean tinyllama?"),
        (("{lisa: [lisa, lisa-keep]}", "{lsa: [lisa, lisa-keep]}"),
         "published.methods.lsa: the published numbers have no method lsa: did you mean lisa?"),
    ],
)  # fmt: skip
def test_a_label_that_the_paper_does_not_have_is_refused(edit: tuple[str, str], complaint: str, tmp_path: Path) -> None:
    path = data.study_file(tmp_path, edit)
    labels = load_efficiency(path).published
    assert labels is not None
    with pytest.raises(ConfigError, match=rf"^{re.escape(str(path))}:\d+: {re.escape(complaint)}$"):
        check_published(path, labels, data.published())


def test_the_repositorys_labels_are_the_papers() -> None:
    labels = data.study().published
    assert labels is not None
    check_published(data.ROOT / "config" / "efficiency.yaml", labels, data.published())


def test_a_row_of_the_lengths_is_a_shape_that_a_goal_may_name(tmp_path: Path) -> None:
    study = load_efficiency(data.study_file(tmp_path, replaced(GRASS, "1x1024", "1x4096")))
    (lengths,) = [line for line in study.order if isinstance(line, Lengths)]
    assert 4096 in lengths.tokens
    assert study.shape("1x4096").length == 4096


def test_options_name_a_variant_as_its_record_is_called() -> None:
    assert variant_name({}) == ""
    assert variant_name({"offload": "resident", "active_layers": 4, "train_head": False}) == (
        "offload=resident,active_layers=4,train_head=false"
    )
