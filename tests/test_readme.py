from pathlib import Path

from headway.catalogue import methods

README = Path(__file__).parents[1] / "README.md"


def test_the_table_of_the_readme_is_the_catalogue():
    text = README.read_text()
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == [method.key for method in methods()]
    for method, row in zip(methods(), rows, strict=True):
        assert method.arxiv in row and method.paper in row
