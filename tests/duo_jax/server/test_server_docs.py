"""The Python of the page on the server runs, on a server of the demo model."""

from tests.docs.test_examples import WITH_SERVER, blocks

URL = "http://127.0.0.1:8000"


def test_examples_run(served, capsys):
    [block] = blocks(WITH_SERVER)
    assert URL in block
    exec(compile(block.replace(URL, served.url), str(WITH_SERVER), "exec"), {})
    assert capsys.readouterr().out.strip()
