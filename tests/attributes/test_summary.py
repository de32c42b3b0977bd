from afmrl_jax.attributes.summary import describe_answers


def test_answers_are_counted_by_verdict_form_and_name():
    valid = [
        {"attributes": {"color": "red", "type": "mug"}},
        {"attributes": {"color": "blue"}, "form": "json"},
        {"attributes": {"color": "red", '{"size"': "l", "gr\x1b[31m": "x"}},
    ]
    invalid = [
        {"verdict": "unclosed", "answer": ""},
        {"verdict": "unclosed", "answer": "color: r"},
        {"verdict": "refused", "answer": "", "reason": "status 400: bad image"},
    ]
    told = describe_answers(valid, invalid).splitlines()
    assert told[0] == "3 valid, 2.0 attributes each; read as plain 2, json 1"
    names = "names: color 3, type 1, {\"size\" 1, 'gr\\x1b[31m' 1"
    once = "3 of 4 in one listing only, as type, {\"size\", 'gr\\x1b[31m'"
    assert told[1] == f"{names}; {once}"
    assert told[2].startswith("3 invalid: unclosed 2, refused 1; to have some asked again, delete")
    assert told[3].startswith("1 of the unclosed hold no word")
    assert told[4] == "the commonest reason for no answer (1): status 400: bad image"


def test_many_names_are_cut_to_the_commonest():
    valid = [{"attributes": {f"name {i}": "x", "color": "red"}} for i in range(30)]
    told = describe_answers(valid, []).splitlines()
    assert told[1].startswith("names: color 30, name 0 1,") and "and 19 more" in told[1]
    assert "30 of 31 in one listing only, as name 0, name 1, name 2, name 3, name 4" in told[1]


def test_lines_that_a_person_made_are_counted_too():
    told = describe_answers([{"listing_id": "a"}, {"attributes": None}], [{}])
    assert told.startswith("2 valid, 0.0 attributes each") and "1 invalid: None 1" in told
    assert describe_answers([], []) == "0 valid"
