from afmrl_jax.core.tables import markdown_table


def test_cells_are_padded_to_their_columns():
    table = markdown_table(("", "R@1"), [("trained", "0.5"), ("a", "")])
    assert table == "|         | R@1 |\n| ------- | --- |\n| trained | 0.5 |\n| a       |     |"
