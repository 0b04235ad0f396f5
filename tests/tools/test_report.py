"""tools/report.py: the page says what the run folders hold, and nothing else; it asks for nothing from outside."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest

from unitdist.config_file import dump_config, load_config
from unitdist.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[2]
TOOLS = REPOSITORY / "tools"
ENDLESS = {"br", "wbr", "meta", "i"}


@pytest.fixture(autouse=True)
def tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))


def modules() -> tuple[ModuleType, ModuleType, ModuleType, ModuleType]:
    import report_charts
    import report_page
    import report_paper
    import report_runs

    return report_runs, report_page, report_charts, report_paper


def make_run(
    folder: Path, *overrides: str, config: str = "demo.yaml", epochs: int = 4, done: int = 4, top1: float = 70.0
) -> Path:
    """A run folder as the trainer leaves it: `done` epochs of 30 steps, the last with validation top-1 `top1`."""
    folder.mkdir(parents=True)
    resolved = load_config(config, [f"train.epochs={epochs}", *overrides])
    (folder / "config.yaml").write_text(dump_config(resolved))
    lines: list[dict[str, Any]] = []
    for epoch in range(1, done + 1):
        timing = {"images_per_s": 100.0 + epoch, "data_wait_share": 0.015, "seconds": 1.0}
        lines.append(
            {
                "event": "train",
                "epoch": epoch,
                "step": 30 * epoch,
                "loss": 5 / epoch,
                "top1": 50.0,
                "lr": 0.01,
                **timing,
            }
        )
        record = {
            "event": "epoch",
            "epoch": epoch,
            "step": 30 * epoch,
            "lr": 0.01,
            "train_loss": 4 / epoch,
            "train_top1": 60.0,
        }
        record |= {"val_top1": top1 - (done - epoch), "val_top5": 99.0, "val_loss": 1.0, "val_count": 240}
        for place, layer in enumerate(("stages.0.0.norm1", "stages.0.0.norm2")):
            record |= {
                f"analysis/{layer}/alpha_{which}": place + value
                for which, value in (("min", -0.5), ("mean", 0.0), ("max", 0.25))
            }
            record |= {f"analysis/{layer}/shift": 1.0 / epoch, f"analysis/{layer}/bound": None}
        lines.append(record | timing)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def evaluation(folder: Path, top1: float) -> None:
    summary = {
        "count": 240,
        "views": 42,
        "top1": top1,
        "top5": 99.5,
        "top1_interval": [top1 - 5, top1 + 5],
        "top5_interval": [99, 100],
    }
    scales = [{**summary, "scale_px": side, "views": 10} for side in (224, 256)]
    crops = {**summary, "scales": scales, "paper": {"top1": 78.33, "top5": 93.22}}
    report = {"protocols": {"crops": crops, "single": {**summary, "scales": scales[1:]}}}
    folder.mkdir(exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report))


class Balance(HTMLParser):
    """Every element that is opened is closed in its turn; texts and tags are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("wbr", "meta"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def page_of(*folders: Path, evaluations: tuple[Path, ...] = ()) -> str:
    runs, pages, _, _ = modules()
    page: str = pages.build_page(runs.read_runs(folders, evaluations))
    parser = Balance()
    parser.feed(page)
    assert parser.open == []
    return page


def rows(page: str, start: str) -> list[list[str]]:
    """The cells of the first table after `start`, as text."""
    body = page[page.index(start) :].partition("</section>")[0].partition("</table>")[0]
    plain = [
        re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.DOTALL)
        for row in re.findall(r"<tr>(.*?)</tr>", body, re.DOTALL)
    ]
    return [[re.sub(r"<[^>]+>", "", cell).strip() for cell in row] for row in plain]


def test_results_are_the_records_numbers(tmp_path: Path) -> None:
    page = page_of(
        make_run(tmp_path / "unit", top1=71.25), make_run(tmp_path / "bn", "model.norm=batchnorm", "run.seed=7", done=2)
    )
    head, unit, bn = rows(page, "<h2>Results")
    shown = dict(zip(head, unit, strict=True))
    assert shown == {
        "run": "unit", "state": "finished, step 120", "epochs": "4 of 4", "seed": "0", "best top-1 %": "71.25 (epoch 4)",
        "last top-1 %": "71.25", "last top-5 %": "99.00", "train loss": "1.0000", "images/s": "102.5", "data wait": "1.5 %",
    }  # fmt: skip
    assert bn[:4] == ["bn", "unfinished, step 60", "2 of 4", "7"]


def test_only_keys_that_differ_are_listed(tmp_path: Path) -> None:
    page = page_of(
        make_run(tmp_path / "a"), make_run(tmp_path / "b", "optim.lr=0.02", "run.seed=1", "data.path=elsewhere")
    )
    assert rows(page, "<h2>Recipe differences") == [
        ["key", "a", "b"],
        ["run.seed", "0", "1"],
        ["optim.lr", "0.01", "0.02"],
    ]


def test_seeds_of_one_recipe_have_median_and_spread_of_the_finished(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / f"s{seed}", f"run.seed={seed}", top1=70.0 + seed) for seed in (0, 1, 4)]
    folders.append(make_run(tmp_path / "aborted", "run.seed=9", done=1))
    other = make_run(tmp_path / "other", "optim.lr=0.5")
    table = rows(page_of(*folders, other), "Seeds of one recipe")
    assert table[1:] == [
        [
            "s0, s1, s4, aborted",
            "71.00 (70.00 to 74.00, 3 runs)",
            "99.00 (99.00 to 99.00, 3 runs)",
            "1.00 (1.00 to 1.00, 3 runs)",
            "1 unfinished",
        ]
    ]


def test_papers_numbers_stand_beside_the_papers_recipe_alone(tmp_path: Path) -> None:
    same = make_run(tmp_path / "same", "data.num_threads=9", config="imagenet_r101_unit.yaml", epochs=120, done=120)
    evaluation(same / "evaluation", 78.0)
    shorter = make_run(tmp_path / "shorter", config="imagenet_r101_unit.yaml", epochs=90, done=90)
    table = rows(page_of(same, shorter), "<h2>Beside the paper")
    assert [row[0] for row in table[1:]] == ["same"] * 4
    assert [row[2:] for row in table[1:]] == [
        ["crops top1", "78.33", "78.00 (one run)"],
        ["crops top5", "93.22", "99.50 (one run)"],
        ["fully_convolutional top1", "77.84", "not recorded"],
        ["fully_convolutional top5", "93.33", "not recorded"],
    ]


def test_every_arm_with_a_number_is_recognized_by_its_config(tmp_path: Path) -> None:
    runs, _, _, paper = modules()
    for experiment, arm, recipe in paper._recipes():
        config = load_config(
            REPOSITORY / "configs" / "paper" / experiment.config, [*arm.overrides, "run.seed=4", "data.path=x"]
        )
        assert runs.essence(config) == recipe
    recipes = [json.dumps(recipe, sort_keys=True) for _, _, recipe in paper._recipes()]
    assert len(recipes) == len(set(recipes)) == 12 + 2 + 12  # tables 1 and 2, 3, 4


def test_evaluation_in_the_folder_and_elsewhere(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "b", "run.seed=1")
    evaluation(tmp_path / "elsewhere", 60.0)
    evaluation(second / "evaluation", 80.0)
    table = rows(page_of(first, second, evaluations=(tmp_path / "elsewhere" / "report.json",)), "<h2>Evaluation")
    assert [row[:3] for row in table[1:]] == [
        [run, protocol, scale.replace(" ", "\N{NO-BREAK SPACE}")]
        for run in ("a", "b")
        for protocol, scale in [
            ("crops", "all scales"),
            ("crops", "224 px"),
            ("crops", "256 px"),
            ("single", "256 px"),
        ]
    ]
    assert table[1][5:8] == ["60.00 (55.00 to 65.00)", "99.50 (99.00 to 100.00)", "78.33 / 93.22"]


def test_what_is_missing_reads_not_recorded(tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.yaml").write_text(dump_config(load_config("demo.yaml")))
    (bare / "metrics.jsonl").write_text('{"event": "train", "epoch": 1, "step": 5, "lo')  # killed within its first line
    page = page_of(bare)
    result = rows(page, "<h2>Results")[1]
    assert result[1] == "unfinished, no step recorded" and result[2] == "0 of 14" and result[4:] == ["not recorded"] * 6
    environment = rows(page, "<h2>Environment")[1]
    assert environment == ["bare", "0", *["not recorded"] * 7]
    assert page.count('text-anchor="middle">not recorded</text>') == 7  # five curves, two of throughput


def test_environment_lists_every_start(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a")
    start = {
        "started": "2026-11-25 10:00:00",
        "world_size": 2,
        "hardware": "CPU",
        "commit": "abc",
        "command": "train.py",
        "versions": {"torch": "2.15"},
    }
    lines = [json.dumps({**start, "resumed_step": step}) for step in (0, 60)]
    (folder / "environment.jsonl").write_text("\n".join(lines) + "\n")
    assert [row[3] for row in rows(page_of(folder), "<h2>Environment")[1:]] == ["0", "60"]
    assert rows(page_of(folder), "<h2>Environment")[1][4:] == ["2", "CPU", "abc", "train.py", "torch 2.15"]


def test_hostile_names_are_text(tmp_path: Path) -> None:
    hostile = "<img src=x onerror=alert(1)>\"'&"
    folder = make_run(tmp_path / hostile.replace("/", ""))
    status = {"state": "<script>alert(2)</script>", "reason": "</td><script>alert(3)</script>", "step": 1}
    (folder / "status.json").write_text(json.dumps(status))
    records = (folder / "metrics.jsonl").read_text().replace("stages.0.0.norm1", "<script>alert(4)</script>")
    (folder / "metrics.jsonl").write_text(records + '{"event": "epoch", "epoch": 3, "step": 90}\n')
    page = page_of(folder, make_run(tmp_path / "plain"))
    assert "<img" not in page and "<script" not in page and "&lt;img src=x onerror=alert(1)&gt;" in page
    assert "&lt;script&gt;alert(3)" in page and "&lt;script&gt;alert(4)" in page


def test_the_page_asks_for_nothing_from_outside(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "a"), make_run(tmp_path / "b", "optim.lr=0.02"))
    parser = Balance()
    parser.feed(page)
    assert not {tag for tag, _ in parser.tags} & {"script", "link", "img", "iframe", "object", "embed", "base"}
    assert not [
        attributes
        for _, attributes in parser.tags
        if attributes.keys() & {"src", "href", "srcset", "data", "xlink:href"}
    ]
    assert "url(" not in page and "@import" not in page and "http://" not in page and "https://" not in page
    assert "default-src 'none'" in page


def test_charts_are_xml_and_keep_spikes() -> None:
    _, _, charts, _ = modules()
    spike = [(float(x), 1.0 if x != 777 else 50.0) for x in range(5000)]
    assert (777.0, 50.0) in charts.thinned(spike) and len(charts.thinned(spike)) <= charts.MOST_POINTS + 1
    line = charts.Line(label="<a>", points=[*spike, (5000.0, float("nan"))], colour="var(--run0)")
    svg = ElementTree.fromstring(charts.line_chart("loss & more", [line], x_label="step", logarithmic=True))
    polyline = next(element for element in svg if element.tag == "polyline")
    ys = [float(point.split(",")[1]) for point in polyline.attrib["points"].split()]
    assert min(ys) >= charts.TOP - 1 and max(ys) <= charts.HEIGHT - charts.BOTTOM + 1
    single = ElementTree.fromstring(
        charts.line_chart("one", [charts.Line(label="a", points=[(1.0, 2.0)], colour="red")], x_label="x")
    )
    assert [element.tag for element in single if element.tag in ("polyline", "circle")] == ["circle"]
    below = [element.text for element in single.iter("text") if element.get("text-anchor") == "middle"]
    assert below == ["0", "1", "2", "x"], "steps and epochs are counted: no mark at half of one"


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (-0.03, 0.07), (1.0, 90.0), (1234.0, 1235.0), (0.0, 1e-6), (1.0, 1.0)]
)
def test_ticks_are_round_and_within(low: float, high: float) -> None:
    _, _, charts, _ = modules()
    marks = charts.ticks(low, high)
    assert 1 <= len(marks) <= 8 and all(low - 1e-9 <= mark <= high + 1e-9 for mark in marks)


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    runs, _, _, _ = modules()
    (tmp_path / "empty").mkdir()
    for folders, words in (([tmp_path / "none"], "no such run folder"), ([tmp_path / "empty"], "holds no run")):
        with pytest.raises(ConfigError, match=words):
            runs.read_runs(folders, [])
    run = make_run(tmp_path / "a")
    with pytest.raises(ConfigError, match="given twice"):
        runs.read_runs([run, run], [])
    with pytest.raises(ConfigError, match="2 files for 1 run"):
        runs.read_runs([run], [run, run])
    (tmp_path / "report.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"is no report\.json"):
        runs.read_runs([run], [tmp_path / "report.json"])
    (run / "config.yaml").write_text("model:\n  nam: x\n")
    assert "unknown key model.nam" in page_of(run)  # the rest of the run is still shown


def test_same_names_in_different_folders_are_told_apart(tmp_path: Path) -> None:
    runs, _, _, _ = modules()
    folders = [make_run(tmp_path / "x" / "run"), make_run(tmp_path / "y" / "run", "run.seed=1")]
    assert [run.name for run in runs.read_runs(folders, [])] == ["x/run", "y/run"]


def test_command(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    command = [sys.executable, str(TOOLS / "report.py"), str(run), "--output", str(tmp_path / "new" / "page.html")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "new" / "page.html").read_text().startswith("<!doctype html>")
    done = subprocess.run([*command[:2], str(tmp_path / "none")], capture_output=True, text=True, timeout=250)
    assert done.returncode == 2 and "error: no such run folder" in done.stderr and "Traceback" not in done.stderr
