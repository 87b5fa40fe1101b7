"""The report of a build: data that survives the file, and a page that says what it should and nothing else."""

import dataclasses
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from rotexport.errors import OutputError
from rotexport.evaluate import Evaluation
from rotexport.metrics import Comparison, Thresholds
from rotexport.progress import StageRecord
from rotexport.report import read_report, write_report
from rotexport.report.data import (
    BodyCount,
    BuildReport,
    ClipSummary,
    ComponentSummary,
    EngineSummary,
    KernelCount,
    ModelSummary,
    PassSummary,
    SiteOutliers,
    StepSummary,
    TransformSummary,
)
from rotexport.report.page import render
from rotexport.validate import BlockError, Proof

MODEL = ModelSummary("Tiny <1M>", "tiny.gguf", "llama", 134_515_008, 3, 64, 49152)
BARE = BuildReport(MODEL, "fp16", "Half precision.", "dtype: fp16\n", "onnx")
CLOSE = Comparison(512, 1e-4, 38.0, 118.0, 1.0, 1e-11, 1.0)
FAR = Comparison(512, 1.5, 38.0, 27.3, 0.999, 0.031, 0.921)


def proof(limits, blocks=(30.0, 20.0, 8.0)):
    errors = tuple(BlockError(block, db, db - 9, 0.1) for block, db in enumerate(blocks))
    reference, found = Evaluation(20.0, 2.996, 3069, 3, 1024), Evaluation(21.0, 3.045, 3069, 3, 1024)
    measured = Proof(FAR, FAR, reference, found, errors)
    return dataclasses.replace(measured, thresholds=tuple(limits.check(measured.figures())))


@pytest.fixture
def full():
    """Every section filled."""
    sites = [f"{block}.{role}" for block in range(3) for role in ("query", "key", "down")]
    ratios = {"query": 18.0, "key": 18.0, "down": 900.0}
    return dataclasses.replace(
        BARE,
        gpus=("sm89",),
        text="Python's language reference",
        command="rotexport build tiny.gguf -o out",
        versions={"torch": "2.13.0"},
        inputs={"tiny.gguf": "ab" * 32},
        files={"model.onnx": 1_000_000, "model.onnx.data": 163_000_000, "config.json": 812},
        cache_bytes_per_token=23040,
        stages=(StageRecord("export", 7.0, 371_000_000), StageRecord("validate", 18.0, None)),
        components=(
            ComponentSummary("residual stream", 64, 12),
            ComponentSummary("queries and keys", 16, 4, ("RotaryEmbedding a", "b", "c", "d", "e")),
        ),
        transforms=(
            TransformSummary("r1", "residual", "folded", "Hadamard 64"),
            *(TransformSummary("r4", f"{b}.down", "online", "Hadamard 96", "a product") for b in range(3)),
            TransformSummary("o_heads", "0.output", "refused", "", "9 heads have no Hadamard"),
        ),
        passes=(
            PassSummary("fold-norms", "equal within rounding", 7, (), CLOSE),
            PassSummary("center-layernorms", "equal within rounding", 0),
            PassSummary("quantize-weights", "changed by quantization", 21, ("0.down is dynamic",), FAR),
        ),
        outliers=tuple(SiteOutliers(s, ratios[s.split(".")[1]], 60.0, 1.9, 3.1) for s in sites),
        steps=(
            StepSummary("as exported", (0.4, 0.2, 0.3)),
            StepSummary("rotated", (0.1, 0.07, 0.125)),
            StepSummary("distilled", (0.03, 0.02, 0.0625)),
        ),
        clips=(
            ClipSummary(1, "0.query, 0.key", 0.85, 0.0625, 0.0312),
            ClipSummary(2, "0.query, 0.key", 0.9, 0.0471, 0.0412),
        ),
        proof=proof(Thresholds(kl=0.1, top1_agreement=0.9)),
        engines=(
            EngineSummary(
                *("tensorrt-rtx", "sm89", "a.plan", 171_000_000, 12.0),
                (KernelCount("down", "int8 gemm", 3),),
                (BodyCount("FastHadamard", "rows of 6 elements", ("0.key", "1.key")),),
            ),
        ),
        notes=("0.down is dynamic per token",),
    )


class Page(HTMLParser):
    """Collects what a reader sees and what a browser would load; unbalanced tags are an error."""

    VOID = frozenset({"meta", "br", "link", "img"})

    def __init__(self, text):
        super().__init__()
        self.words, self.open, self.attributes, self.tags = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "body" in self.open:
            self.words.append(data)


def test_data_survive_the_file(full, tmp_path):
    write_report(full, tmp_path)
    assert read_report(tmp_path) == full
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_a_new_proof_can_replace_the_old_one(full, tmp_path):
    write_report(full, tmp_path)
    again = dataclasses.replace(read_report(tmp_path), proof=proof(Thresholds(kl=0.01)), text="another.txt")
    write_report(again, tmp_path)
    page = Page((tmp_path / "report.html").read_text())
    assert "Failed. 1 of 1 threshold missed." in page.text
    assert "(another.txt)" in page.text


def test_a_figure_that_is_not_finite_is_left_out_of_the_json(full, tmp_path):
    strange = dataclasses.replace(full, outliers=(SiteOutliers("0.down", np.inf, 3.0),))
    write_report(strange, tmp_path)
    assert np.isnan(read_report(tmp_path).outliers[0].ratio_before)
    assert table_rows((tmp_path / "report.html").read_text(), "ratio before")[0][1] == "–"


def test_the_page_needs_nothing_from_outside(full):
    page = Page(render(full))
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not any(name in ("src", "href") for name, _ in page.attributes)
    assert "url(" not in render(full)
    assert "@import" not in render(full)


def test_the_page_says_what_was_done_and_how_it_ended(full):
    text = Page(render(full)).text
    assert text.startswith("Tiny <1M> Recipe fp16, target onnx for sm89")
    assert "Passed. 2 thresholds against the PyTorch model, all met." in text
    assert "(llama, 134.5 million parameters, 3 blocks of width 64, vocabulary 49,152)" in text
    assert "Of 5 rotations, 1 went into the weights" in text
    assert "3 online into the graph. 1 could not be placed." in text
    assert "over 512 tokens (Python's language reference)" in text
    assert "21 perplexity (PyTorch: 20, +5.0%)" in text
    assert "164 MB ONNX model with weights" in text
    assert "25.0 s to build, at most 371 MB of memory" in text
    assert "0.down is dynamic per token" in text


def test_each_pass_has_its_error(full):
    rows = table_rows(render(full), "rewrites")
    assert rows[0][:6] == ["fold-norms", "equal within rounding", "7", "1.00e-04", "2.63e-06", "118.0 dB"]
    assert rows[1][3:] == ["", "", "", "nothing to change"]
    assert rows[2][6] == "0.down is dynamic"


def test_alike_transforms_share_a_row(full):
    rows = table_rows(render(full), "transform")
    assert [row[3] for row in rows] == ["1", "3", "1"]
    assert rows[2][1:] == ["refused", "", "1", "9 heads have no Hadamard"]


def test_pins_are_shortened(full):
    rows = table_rows(render(full), "pinned by")
    assert [row[3] for row in rows] == ["free", "RotaryEmbedding a; b; c; and 2 more"]


def test_engines_show_the_kernel_of_each_product(full):
    assert table_rows(render(full), "built in") == [["a.plan", "tensorrt-rtx", "sm89", "171 MB", "12.0 s"]]
    assert table_rows(render(full), "Product") == [["down", "3 × int8 gemm"]]


def test_operators_without_a_kernel_are_listed_with_the_reason(full):
    rows = table_rows(render(full), "Operator")
    assert rows == [["FastHadamard", "rows of 6 elements", "0.key, 1.key"]]
    assert "Operators without a kernel" not in render(dataclasses.replace(full, engines=()))


def test_sites_that_read_one_tensor_share_a_panel(full):
    page = Page(render(full))
    assert "query, key" in page.text
    assert page.text.count("before: 900") == 3


def test_every_block_and_stage_is_drawn(full):
    page = Page(render(full))
    for block, ratio in enumerate((30, 20, 8)):
        assert f"block {block}, median token: {ratio}" in page.text
    assert page.tags.count("rect") == len(full.stages)
    assert "below the dashed line" in page.text.lower()


def test_a_good_build_has_no_line_of_divergence(full):
    clean = dataclasses.replace(full, proof=proof(Thresholds(), blocks=(120.0, 119.0, 118.0)))
    page = Page(render(clean))
    assert "dashed line" not in page.text
    assert "Measured. The recipe sets no thresholds" in page.text


def test_missed_thresholds_and_the_first_diverged_block_lead_the_page(full):
    page = Page(render(dataclasses.replace(full, proof=proof(Thresholds(kl=0.001, cosine=0.5)))))
    assert (
        "Failed. 1 of 2 thresholds missed. The first block that no longer follows PyTorch is block 2."
        in page.text
    )
    assert "KL divergence, nats per token: 0.031, at most 0.001 asked" in page.text


def test_a_bare_build_has_only_what_it_has():
    page = Page(render(BARE))
    assert "Not validated." in page.text
    assert "Nothing was rotated." in page.text
    for absent in (
        "Against PyTorch",
        "Outliers",
        "Rotations",
        "Passes",
        "Engines",
        "Time and memory",
        "Versions",
    ):
        assert absent not in page.text
    assert "svg" not in page.tags


def test_names_cannot_break_out_of_the_page(full):
    hostile = "<script>alert(1)</script>"
    report = dataclasses.replace(full, notes=(hostile,), recipe=hostile, text=hostile, recipe_text=hostile)
    page = Page(render(report))
    assert "script" not in page.tags
    assert hostile in page.text


@pytest.mark.parametrize("content", ["{", "[]", '{"model": 3}'])
def test_a_broken_report_is_named(tmp_path, content):
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(OutputError, match=r"report\.json' is not a report"):
        read_report(tmp_path)


def test_a_missing_report_asks_for_a_build(tmp_path):
    with pytest.raises(OutputError, match="the directory of a build"):
        read_report(tmp_path)


def test_an_unwritable_directory_is_named(full, tmp_path):
    with pytest.raises(OutputError, match="cannot write"):
        write_report(full, tmp_path / "gone")


def table_rows(html, column):
    """Return the cells of the table that has a header `column`."""
    for table in re.findall(r"<table>(.*?)</table>", html, re.DOTALL):
        if re.search(rf"<th[^>]*>{column}</th>", table):
            rows = re.findall(r"<tr>(.*?)</tr>", table)[1:]
            return [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in rows]
    raise AssertionError(f"no table has a column '{column}'")


def test_every_step_shows_every_blocks_error(full):
    page = render(full)
    assert "<h2>Step by step</h2>" in page
    table = page[page.index("Step by step") : page.index("<h2>Clips</h2>")]
    for words in ("as exported", "rotated", "distilled", "0.4", "0.07", "0.0625", "mean"):
        assert words in table
    clips = page[page.index("<h2>Clips</h2>") :]
    for words in ("2 choices", "0.query, 0.key", "before weights", "behind weights", "0.85", "0.0412"):
        assert words in clips
    assert "Step by step" not in render(BARE) and "<h2>Clips</h2>" not in render(BARE)
