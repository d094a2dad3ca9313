"""The benchmarks run, and each replaces its own results alone."""

from benchmarks import preprocess_speed, results, results_speed


def test_a_section_is_replaced_and_the_others_stay(tmp_path):
    path = tmp_path / "RESULTS.md"
    for title, text in (("One", "first"), ("Two", "second"), ("One", "third")):
        results.write_section(title, text, path)
    content = path.read_text()
    assert content.startswith("# Results")
    assert content.index("## One\n\nthird") < content.index("## Two\n\nsecond")
    assert "first" not in content and content.count("## ") == 2


def test_cutting_is_measured(tmp_path):
    path = tmp_path / "RESULTS.md"
    small = ["--images", "3", "--size", "148", "--rounds", "1", "--results", str(path)]
    preprocess_speed.main(preprocess_speed.parse_args(small))
    assert "12 patches of 128 x 128 pixels" in path.read_text()


def test_writing_results_is_measured(tmp_path):
    path = tmp_path / "RESULTS.md"
    small = ["--nuclei", "150", "--images", "3", "--results", str(path)]
    results_speed.main(results_speed.parse_args(small))
    assert "150 nuclei" in path.read_text() and "report.html of 3 images" in path.read_text()
