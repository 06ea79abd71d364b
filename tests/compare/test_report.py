"""The report in Markdown and as a page: verdict first, details folded, nothing fetched, no text taken for markup."""

import json
import re
from html.parser import HTMLParser

import pytest
from compare.folders import (
    BASELINE,
    KD_OFF,
    TEACHER,
    TREATED,
    check_refused,
    command,
    report_of,
    result_of,
    spoil_summary,
    write_runs,
)

from w2s.compare.__main__ import main

NASTY = "</script><img src=x onerror=alert(1)> {{DATA}} | a"


class Page(HTMLParser):
    """The tags of a page, with their attributes, and the text of the data that its script draws from."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.texts, self.inside = [], {}, ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list) -> None:
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        self.inside = attributes.get("id") or attributes.get("class") or tag

    def handle_data(self, data: str) -> None:
        self.texts[self.inside] = self.texts.get(self.inside, "") + data


@pytest.fixture
def out(tmp_path):
    """A comparison of two arms of three seeds, drawn."""
    base = write_runs(tmp_path, "base", BASELINE, (10.0, 8.0, 11.0))
    treated = write_runs(tmp_path, "w2s", TREATED, (12.0, 11.0, 14.0), teacher=TEACHER, kd_off=KD_OFF)
    spoil_summary(treated[0], name=NASTY)
    for folder in treated:
        spoil_summary(folder, teacher=TEACHER | {"model": NASTY})
    assert main(command(base, treated, tmp_path / "out")) == 0
    return tmp_path / "out"


def test_the_verdict_stands_first_in_both(out):
    words = "treated reaches top1 >= 60 at epoch 2 instead of 4 (medians of 3 and 3 runs); paired by seed, 1.71x in ep"
    markdown, page = (out / "report.md").read_text(), (out / "report.html").read_text()
    assert markdown.split("\n\n")[1].startswith(f"**{words}")
    assert Page(page).texts["verdict"].startswith(words)
    assert "not shown to differ from 1; p 0.25" in markdown


def test_the_curves_one_table_and_the_final_metric_follow_and_the_rest_is_folded(out):
    for name, parts in (
        ("report.md", ("![curves](curves.png)", "| top1 >= tau", "## Final top1")),
        ("report.html", ('id="plot"', "<th>top1 &gt;= tau", "<h2>Final top1")),
    ):
        text = (out / name).read_text()
        places = [text.index(part) for part in ("treated reaches", *parts, "<details>", "<summary>first@60")]
        assert places == sorted(places)
        assert text.count("<details>") == text.count("</details>") == 5


def test_the_page_fetches_nothing_and_takes_no_text_for_markup(out):
    page = Page((out / "report.html").read_text())
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert not [tag for tag, _ in page.tags if tag in ("img", "link", "iframe") and _.get("href") != "data:,"]
    assert not [a for _, attributes in page.tags for a in attributes if a in ("src", "srcset", "action")]
    assert NASTY in page.texts["li"]  # as text
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", (out / "report.html").read_text())
    assert "\n| " in (out / "report.md").read_text()
    assert "<img" not in (out / "report.md").read_text()


def test_the_page_holds_every_run_crossing_and_window(out):
    data = json.loads(Page((out / "report.html").read_text()).texts["data"])
    assert [arm["name"] for arm in data["arms"]] == ["baseline", "treated"]
    assert data["targets"] == [60]
    for arm, curves, ends in zip(data["arms"], (BASELINE, TREATED), (None, 2.0), strict=True):
        assert [[point["value"] for point in run["points"]] for run in arm["runs"]] == curves
        assert {run["off"]["epoch"] for run in arm["runs"]} == {ends}
    firsts = [m["epoch"] for run in data["arms"][1]["runs"] for m in run["marks"] if m["kind"] == "first"]
    assert firsts == [2, 2, 3]
    assert [run["off"]["train_seconds"] for run in data["arms"][1]["runs"]] == [24, 22, 28]  # 2 epochs each


def test_the_report_holds_settings_and_commands(out):
    markdown = (out / "report.md").read_text()
    assert f"This report: python -m w2s.compare --baseline {out.parent / 'base-0'}" in markdown
    assert f"- treated: python train_*.py -c {out.parent / 'w2s-2'}/args.yaml" in markdown
    assert "The same in all arms: batch_size 10, dataset digits, epochs 5, lr 0.1." in markdown


def test_the_verdict_of_runs_that_reach_nothing(tmp_path):
    base = write_runs(tmp_path, "base", [[50, 55], [51, 56]])
    treated = write_runs(tmp_path, "w2s", [[50, 58], [51, 57]])
    assert main(command(base, treated, tmp_path / "out")) == 0
    said = report_of(tmp_path).split("\n\n")[1]
    assert said.startswith(
        "**treated shows no speedup over baseline: the median over the 2 seeds of treated does not reach top1 >= 60; "
        "final"
    )
    assert "2 better" in said


def test_the_verdict_says_which_arm_reaches_nothing(tmp_path):
    base = write_runs(tmp_path, "base", [[50, 60], [61, 62], [50, 64]], targets=(60.0, 65.0))
    treated = write_runs(tmp_path, "w2s", [[50, 58], [51, 57], [50, 60]], targets=(60.0, 65.0))
    assert main(command(base, treated, tmp_path / "out")) == 0
    said = report_of(tmp_path).split("\n\n")[1]
    assert "the median over the 3 seeds of treated does not reach top1 >= 60 or 65, that of baseline reaches 60" in said
    assert "at epoch 2; final" in said


def test_the_verdict_does_not_call_equal_medians_earlier(tmp_path):
    base = write_runs(tmp_path, "base", [[60, 61]])
    treated = write_runs(tmp_path, "w2s", [[61, 61]])
    assert main(command(base, treated, tmp_path / "out")) == 0
    said = report_of(tmp_path).split("\n\n")[1]
    assert said.startswith("**treated and baseline both reach top1 >= 60 at epoch 1, neither of them earlier (medians")
    assert "instead of" not in said
    assert "final top1 the same on average" in said


def test_many_arms_have_a_line_each_and_the_first_has_the_sentence(tmp_path):
    curves = {
        "alone": [[50, 55, 60], [51, 56, 61]],
        "taught": [[50, 60, 66], [51, 61, 67]],
        "false": [[40, 41], [42, 43]],
    }
    curves["false"] = [[*curve, 44] for curve in curves["false"]]
    words = [f"--arm={arm}={folder}" for arm, group in curves.items() for folder in write_runs(tmp_path, arm, group)]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    report = report_of(tmp_path)
    sentence, table = report.split("\n\n")[1], report.split("## All arms\n\n")[1].split("\n\n")[0]
    assert sentence.startswith("**taught reaches top1 >= 60 at epoch 2 instead of 3") and "false" not in sentence
    rows = {
        (cells := [cell.strip() for cell in line.strip("|").split("|")])[0]: cells[1:] for line in table.split("\n")
    }
    assert list(rows)[2:] == ["alone", "taught", "false"]
    assert [rows[arm][:2] for arm in curves] == [["60.5", ""], ["66.5", "6"], ["44", "-16.5"]]
    assert [rows[arm][4:6] for arm in curves] == [["3", ""], ["2", "1.50x"], ["> 3", "n/a"]]


def test_target_overrides_and_the_report_says_so(tmp_path, arms):
    result = result_of(tmp_path, *arms, "--target", "62.0", "60", "60.0")
    assert list(result["targets"]) == ["60", "62"]
    assert result["targets"]["62"]["baseline"]["epoch"]["runs"] == [4, 5, 4]
    titles = re.findall("<summary>(first@.*)</summary>", report_of(tmp_path))
    assert titles == ["first@60", "first@62 (not among the targets of every run)"]


def test_the_report_states_rule_and_conditions(tmp_path, arms):
    result_of(tmp_path, *arms)
    report = report_of(tmp_path)
    for text in (
        "first evaluation with top1 >= tau",
        "- baseline: 3 runs, seeds 0, 1, 2\n",
        "- Grid: 5 evaluations a run; step, and so resolution: 1 epochs\n",
        "- Hardware and software: torch 2.11.0, device cpu, 2 cores, processes 1\n",
        "- w2s-1: teacher resnet10t, 4922416 parameters, top1 68.25 on the switch split and 67.5 on the reporting "
        "split; 10.0% of train seconds; switched off at epoch 2 (surpass); an update with the teacher took 1.11x of "
        "one without\n",
    ):
        assert text in report
    assert report.count("switched off") == 3


def test_the_report_names_hardware_that_differs_and_a_teacher_that_stays(tmp_path, capsys):
    base = write_runs(tmp_path, "base", [[50, 60]], environment={"device": "H200"})
    treated = write_runs(tmp_path, "w2s", [[60, 60]], teacher=TEACHER, environment=None)
    check_refused(tmp_path, capsys, command(base, treated, tmp_path / "out"), "device: 'H200' in ", "None in ")
    result_of(tmp_path, base, treated, "--allow", "device")
    report = report_of(tmp_path)
    assert "- Hardware and software, not the same for all runs: device H200; hardware not recorded\n" in report
    assert "never switched off" in report


def test_a_run_alone_has_no_options_of_a_teacher(out):
    """Though its args.yaml has their defaults."""
    assert re.search(r"^\| kd_weight +\| none +\| 3.0 +\|$", (out / "report.md").read_text(), re.M)
