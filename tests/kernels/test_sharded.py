"""Parameters that FSDP2 has sharded, by two processes and by one: what torch makes of the whole ones."""


def test_shards_equal_whole_parameters(ranks):
    result = ranks(2, "tests/kernels/sharded.py")
    assert result.returncode == 0, result.stderr[-4000:]
