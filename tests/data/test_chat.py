"""Chat templates of model directories, which nobody has read: equal texts, within limits."""

import time

import pytest

from ntkrl import chat_templates
from ntkrl.data import turn_end_id
from ntkrl.data.chat import TEMPLATES, apply_template, render_conversations, render_prompts
from ntkrl.data.prompts import PromptSet
from ntkrl.data.tokens import encode_prompts

EVERYTHING = (
    "{{ bos_token or '' }}{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"
    "{% set ns = namespace(count=0) %}{% for m in messages %}"
    "{% if m.content is none or m.name is defined %}[{{ m.name }}]{% endif %}"
    "{% if m.role == 'system' %}{% continue %}{% endif %}"
    "{{ '<|' + m['role'] + '|>' }}{% generation %}{{ m['content'] | trim }}{% endgeneration %}"
    "{{ eos_token }}{% set ns.count = ns.count + 1 %}{% endfor %}{{ ns.count }}"
    "{{ style | default('plain') }}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
LARGE = {
    "a range": "{% for i in range(10**9) %}x{% endfor %}",
    "a string": "{{ 'x' * 10**11 }}",
    "doubling": "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}"
    "{% endfor %}{{ n.x }}",
    "a list": "{{ [0] * 10**10 }}",
    "a width": "{{ '%1000000000000d' % 1 }}",
    "padding": "{{ 'x'.center(10**11) }}",
    "an indent": "{{ messages | tojson(indent=10**11) }}",
    "joining": "{{ ('x' * 10**6).join(['y'] * 10**5) }}",
    "replacing": "{{ ('x' * 10**6) | replace('x', 'y' * 10**6) }}",
    "a text": "{{ 'x' * 10**7 }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "nesting": "{{ " + "(" * 10**5 + "}}",
    "an attribute": "{{ messages[0].content.x.y }}",
    "division": "{{ 1 / 0 }}",
    "internals": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "another file": "{% include '/etc/passwd' %}",
    "syntax": "{% if %}",
}


def user(text):
    """Return a conversation of one message."""
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize("template", [EVERYTHING, {"default": "1", "tool_use": EVERYTHING}])
def test_equal_to_the_tokenizer(tokenizer, template):
    """oracle: transformers in this process, for every part of a template, in both modes."""
    tokenizer.chat_template = template
    rows = [
        user("24= "),
        [{"role": "system", "content": "s", "name": None}, *user("ü\U0001f600\ud800 \x00")],
        [*user("1"), {"role": "assistant", "content": "2"}],
        [{"role": "user", "content": "", "name": 1.5}],
    ]
    tools = [[{"type": "function", "number": 7}], None, [], [{"type": "x"}]]
    variables = [{"style": "<b>"}, None, {"style": [1, 2.5, None]}, {"bos_token": "!"}]
    columns = {"tools": tools, "chat_template_kwargs": variables}
    options = [
        {**({"tools": tool} if tool else {}), **(more or {})}
        for tool, more in zip(tools, variables, strict=True)
    ]

    def expected(row, **mode):
        return tokenizer.apply_chat_template(rows[row], tokenize=False, **mode, **options[row])

    conversations = render_conversations(tokenizer, rows, columns, "rows.jsonl")
    assert conversations == [expected(row) for row in range(4)]
    last = [row == 2 for row in range(4)]
    modes = [{"add_generation_prompt": not c, "continue_final_message": c} for c in last]
    if isinstance(template, dict):  # row 2 has no tools, and the other template no content
        rows.pop(2), tools.pop(2), variables.pop(2), options.pop(2), modes.pop(2)
    prompts = render_prompts(tokenizer, rows, columns, "rows.jsonl")
    assert prompts == [expected(row, **mode) for row, mode in enumerate(modes)]


@pytest.mark.parametrize("kind", LARGE)
def test_templates_that_fail(tokenizer, directory, kind):
    """law: refused in time with the row, the file and the reason."""
    tokenizer.chat_template = LARGE[kind]
    began = time.monotonic()
    with pytest.raises(ValueError, match="(?s)rejects 1 rows.*row 0, ") as caught:
        encode_prompts(tokenizer, PromptSet([user("1")], {}, "rows.jsonl"), 10)
    assert f"{directory}/tokenizer_config.json" in str(caught.value)
    assert time.monotonic() - began < 15
    assert turn_end_id(tokenizer) is None


def test_endless_templates(tokenizer, directory, tmp_path, monkeypatch):
    """law: ended in time with the file's name; the next template is rendered."""
    monkeypatch.setattr(chat_templates, "SECONDS", 1.0)
    tokenizer.chat_template = ENDLESS
    message = rf"chat template of {directory}/tokenizer_config.json takes more than 1 s for 1 rows"
    with pytest.raises(ValueError, match=message):
        encode_prompts(tokenizer, PromptSet([user("1")], {}, "rows.jsonl"), 10)
    (tmp_path / "mine.jinja").write_text(ENDLESS)
    template = TEMPLATES["pythia"].__class__(ENDLESS, source="mine.jinja")
    apply_template(tokenizer, template)
    with pytest.raises(ValueError, match=r"chat template of model.template mine.jinja takes more"):
        turn_end_id(tokenizer)
    tokenizer.chat_template = "{{ messages[0].content }}="
    assert render_prompts(tokenizer, [user("1")], {}, "") == ["1="]


def test_the_package_s_templates_need_no_process(tokenizer, monkeypatch):
    """law: they are rendered here."""
    monkeypatch.setattr(chat_templates, "render", None)
    apply_template(tokenizer, TEMPLATES["pythia"])
    expected = f"<|user|>1{tokenizer.eos_token}<|assistant|>"
    assert render_prompts(tokenizer, [user("1")], {}, "") == [expected]


def test_a_killed_process_is_replaced(tokenizer):
    """law: a process that ended between two requests costs nothing but its start."""
    tokenizer.chat_template = "{{ messages[0].content }}="
    for _ in range(2):
        assert render_prompts(tokenizer, [user("1")] * 100, {}, "") == ["1="] * 100
        chat_templates._RENDERER.worker.process.kill()
        chat_templates._RENDERER.worker.process.wait()
