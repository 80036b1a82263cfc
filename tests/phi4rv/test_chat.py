"""Chat templates: golden prompts of the published code, spans against transformers, and every refusal."""

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from phi4rv.errors import UserError
from phi4rv.processing.chat_template import ChatTemplate, Message, RenderedChat, split_at_images

CHECKPOINT = Path(__file__).parents[1] / "data" / "tiny-checkpoint"
PUBLISHED = (CHECKPOINT / "chat_template.jinja").read_text(encoding="utf-8")
CASES = json.loads((CHECKPOINT / "expected" / "cases.json").read_text(encoding="utf-8"))
QUESTION = [Message("user", "hi")]
CHAT = [
    Message("user", "first <image>\nquestion"),
    Message("assistant", "the same"),
    Message("user", "the same"),
    Message("assistant", "the same"),
    Message("user", "the same<|im_end|>\n the same \r\n"),
    Message("assistant", "<think>a\nb</think>\n\n c  "),
]

# Every assistant's text through one block, reached in different ways.
TEMPLATES = {
    "published": PUBLISHED,
    "loops and ifs": """\
{% for m in messages %}
  {% if m.role != 'user' %}
    {% for c in [m.content] %}
      {% if c %}
A:{% generation %}{{ c }}<|im_end|>{% endgeneration %}

      {% endif %}
    {% endfor %}
  {% else %}
    {{ m.content }}
  {% endif %}
{% endfor %}""",
    "white space control": """\
{%- for m in messages -%}
  {{- bos_token }}[{{ m.role }}]
  {%- if m.role == 'assistant' %}
    {%- generation -%}  {{ m.content }}{{ eos_token }} {%- endgeneration -%}
  {%- else %}{{ m.content }}{% endif %}
{%- endfor %}
end
""",
    "only the last": """\
{% for m in messages %}{% if loop.last and m.role == 'assistant' %}
{% generation %}
{% set shown = m.content %}
{{ shown }}<|im_end|>{% endgeneration %}
{% else %}{{ m.content }}/{% endif %}{% endfor %}""",
    "break": """\
{% for m in messages %}{% if loop.index > 6 %}{% break %}{% endif %}
{% if m.role == 'user' %}{{ m.content }}{% continue %}{% endif %}
{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}""",
}


def reference(source: str, messages: list[Message], prompt: bool) -> tuple[str, list[tuple[int, int]]]:
    chat = [{"role": m.role, "content": m.content} for m in messages]
    texts, spans = render_jinja_template(
        [chat],
        chat_template=source,
        return_assistant_tokens_mask=True,
        add_generation_prompt=prompt,
        bos_token="<s>",
        eos_token="<|im_end|>",
    )
    return texts[0], spans[0]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["mode"])
def test_golden_prompts(case: dict) -> None:
    template = ChatTemplate(PUBLISHED)
    rendered = template.render([Message("user", case["prompt"])], case["mode"])
    assert rendered.text == case["rendered"]
    assert rendered.spans == []
    pieces = split_at_images(rendered, len(case["images"]))
    assert "<image>".join(pieces) == case["rendered"]
    assert pieces == split_at_images(rendered.text, len(case["images"]))


def test_golden_token_ids() -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    for case in CASES:
        rendered = ChatTemplate(PUBLISHED).render([Message("user", case["prompt"])], case["mode"])
        pieces = split_at_images(rendered, len(case["images"]))
        ids = [token for piece in pieces for token in tokenizer.encode(piece, add_special_tokens=False).ids]
        assert ids == [token for token in case["input_ids"] if token >= 0]


@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("turns", [1, 2, 3, 4, 5, 6])
def test_text_and_spans_are_those_of_transformers(source: str, turns: int) -> None:
    template = ChatTemplate(source, variables={"bos_token": "<s>", "eos_token": "<|im_end|>"})
    prompt = turns % 2 == 1
    rendered = template.render(CHAT[:turns], add_generation_prompt=prompt)
    text, spans = reference(source, CHAT[:turns], prompt)
    assert rendered.text == text
    # The published block renders a line break behind <|im_end|>, which the model never writes.
    assert rendered.spans == [
        (start, start + len(re.sub(r"(<\|im_end\|>)\s+$", r"\1", text[start:end]))) for start, end in spans
    ]


def test_published_spans_are_the_answers() -> None:
    rendered = ChatTemplate(PUBLISHED).render(CHAT, add_generation_prompt=False)
    answers = [m.content + "<|im_end|>" for m in CHAT if m.role == "assistant"]
    assert [rendered.text[start:end] for start, end in rendered.spans] == answers
    assert all(rendered.text[:start].endswith("<|im_start|>assistant<|im_sep|>\n") for start, _ in rendered.spans)
    assert all(end <= start for (_, end), (start, _) in pairwise(rendered.spans))


def test_private_use_characters_pass_through() -> None:
    content = "\ue000\ue001\uf8ff\U000f0000\U0010fffd\x00"
    chat = [Message("user", content), Message("assistant", content)]
    rendered = ChatTemplate(PUBLISHED).render(chat, add_generation_prompt=False)
    assert [rendered.text[a:b] for a, b in rendered.spans] == [content + "<|im_end|>"]
    assert rendered.text.count(content) == 2


def test_template_syntax_in_a_message_is_text() -> None:
    content = "{{ 1 + 1 }}{% generation %}{# no #}"
    assert content in ChatTemplate(PUBLISHED).render([Message("user", content)]).text


def test_span_inside_a_captured_block() -> None:
    source = (
        "{% set all %}{% for m in messages %}({% generation %}{{ m.content }}{% endgeneration %})"
        "{% endfor %}{% endset %}[{{ all }}]"
    )
    chat = [Message("user", "ab"), Message("assistant", "ab")]
    rendered = ChatTemplate(source).render(chat, add_generation_prompt=False)
    assert rendered == RenderedChat("[(ab)(ab)]", [(2, 4), (6, 8)])


def test_span_inside_a_macro_and_an_empty_block() -> None:
    source = (
        "{% macro say(m) %}<{% generation %}{{ m.content }}{% endgeneration %}>{% endmacro %}"
        "{% for m in messages %}{{ say(m) }}{% generation %}{% endgeneration %}{% endfor %}"
    )
    chat = [Message("user", "q"), Message("assistant", "aa")]
    assert ChatTemplate(source).render(chat, add_generation_prompt=False) == RenderedChat("<q><aa>", [(1, 2), (4, 6)])


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{% generation %}{{ m.content }}{% break %}{% endgeneration %}{% endfor %}",
        "{% filter upper %}{% generation %}{{ messages[0].content }}{% endgeneration %}{% endfilter %}",
        "{% filter trim %}{% generation %} {{ messages[0].content }} {% endgeneration %}{% endfilter %}",
        "{% generation %}{% generation %}{{ messages[0].content }}{% endgeneration %}{% endgeneration %}",
    ],
    ids=["break", "upper", "trim", "nested"],
)
def test_spans_that_cannot_be_told(source: str) -> None:
    with pytest.raises(UserError, match=r"chat_template.jinja: cannot tell what the assistant wrote"):
        ChatTemplate(source).render([Message("user", "HI")])


def test_modes() -> None:
    template = ChatTemplate(PUBLISHED, nothink_token="<direct>")
    auto = template.render(QUESTION).text
    assert template.render(QUESTION, "think").text == auto + "<think>"
    assert template.render(QUESTION, "nothink").text == auto + "<direct>"
    with pytest.raises(UserError, match="unknown mode 'fast': use one of auto, think, nothink"):
        template.render(QUESTION, "fast")
    with pytest.raises(UserError, match="mode 'think' needs add_generation_prompt"):
        template.render(CHAT, "think", add_generation_prompt=False)


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([], "no messages"),
        ([Message("robot", "x"), *QUESTION], "message 1 has the unknown role 'robot'"),
        ([*QUESTION, Message("assistant", "x")], "last message is from 'assistant'"),
        (
            [*QUESTION, Message("assistant", "<image>"), *QUESTION],
            r"message 2 \(assistant\) has an <image> mark",
        ),
        ([Message("system", "<image>"), *QUESTION], r"message 1 \(system\) has an <image> mark"),
        ([Message("system", "Speak French."), *QUESTION], "ignores system messages"),
        # These words are in the published template's own text.
        ([Message("system", "You are Phi"), *QUESTION], "ignores system messages"),
    ],
)
def test_bad_messages(messages: list[Message], error: str) -> None:
    with pytest.raises(UserError, match=error):
        ChatTemplate(PUBLISHED).render(messages)


def test_system_messages_where_the_template_has_them() -> None:
    every = ChatTemplate("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    chat = [Message("system", "Be brief."), *QUESTION]
    assert every.render(chat).text == "system: Be brief.\nuser: hi\n"
    assert every.render([Message("system", ""), *QUESTION]).text == "system: \nuser: hi\n"
    first = ChatTemplate("{{ messages[0].content }} {{ messages[-1].content }}")
    with pytest.raises(UserError, match="ignores system messages"):
        first.render([Message("system", "a"), Message("system", "b"), *QUESTION])


def test_a_dropped_user_message() -> None:
    with pytest.raises(UserError, match=r"t\.jinja: the template drops or changes message 1, from the user"):
        ChatTemplate("{{ messages[-1].content }}", name="t.jinja").render([Message("user", "a"), *QUESTION])


def test_without_generation_blocks() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.content }};{% endfor %}", name="some/plain.jinja")
    assert template.render([*CHAT[:2], *QUESTION]).spans == []
    assert template.render(QUESTION, add_generation_prompt=False).text == "hi;"
    with pytest.raises(UserError, match=r"some/plain.jinja: training needs .*\{% generation %\}"):
        template.render(CHAT, add_generation_prompt=False)


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("a\n{% for m in messages %}", r"t\.jinja:2: not a valid template"),
        ("{{ 1 }}\n\n{% generation %}\nx", r"t\.jinja:\d: not a valid template"),
        ("{{ 1 }}\n{% endgeneration %}", r"t\.jinja:2: not a valid template: .*endgeneration"),
        ("{{ 1 }}\n{% nonsense %}", r"t\.jinja:2: not a valid template: .*nonsense"),
    ],
)
def test_broken_syntax(source: str, error: str) -> None:
    with pytest.raises(UserError, match=error):
        ChatTemplate(source, name="t.jinja")


@pytest.mark.parametrize(
    ("expression", "error"),
    [
        ("{{ ''.__class__.__mro__ }}", "__class__"),
        ("{{ ''.__class__ }}", "__class__"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ raise_exception.__globals__ }}", "__globals__"),
        ("{{ '{0.__class__}'.format(1) }}", "__class__"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "[Rr]ange too big"),
        ("{{ absent }}", "'absent' is undefined"),
        ("{{ absent.deeper }}", "'absent' is undefined"),
        ("{% for x in absent %}{% endfor %}", "'absent' is undefined"),
        ("{% if messages[0].rool == 'user' %}{% endif %}", "has no attribute 'rool'"),
        ("{{ messages[7].content }}", "has no element 7"),
        ("{{ 1 // 0 }}", "by zero"),
        ("{{ 1 + 'a' }}", "unsupported operand"),
        ("{{ raise_exception('two\nlines') }}", "two lines$"),
        ("{% include 'other' %}", "no loader"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ],
)
def test_failing_templates_name_file_and_line(expression: str, error: str) -> None:
    template = ChatTemplate("one\n{{ messages[0].content }}\n" + expression, name="t.jinja")
    with pytest.raises(UserError, match=rf"^t\.jinja:3: the template failed: .*{error}") as caught:
        template.render(QUESTION)
    assert "\n" not in str(caught.value)


def test_asking_whether_something_exists_is_fine() -> None:
    source = "{% if tools %}x{% endif %}{% if messages[0].calls is defined %}y{% endif %}{{ a | default('z') }}"
    assert ChatTemplate(source + "{{ messages[0].content }}").render(QUESTION).text == "zhi"


def test_tojson_does_not_escape_for_html() -> None:
    rendered = ChatTemplate("{{ messages[0].content | tojson }}").render([Message("user", "<image> é")])
    assert rendered.text == '"<image> é"'


def test_a_template_is_reusable_and_keeps_no_state() -> None:
    template = ChatTemplate(PUBLISHED)
    assert template.render(CHAT, add_generation_prompt=False) == template.render(CHAT, add_generation_prompt=False)
    assert template.render(QUESTION).spans == []


@pytest.mark.parametrize(
    ("text", "images", "pieces"),
    [
        ("", 0, [""]),
        ("<image>", 1, ["", ""]),
        ("a<image><image>b", 2, ["a", "", "b"]),
        ("<Image>", 0, ["<Image>"]),
    ],
)
def test_match_images(text: str, images: int, pieces: list[str]) -> None:
    assert split_at_images(text, images) == pieces


@pytest.mark.parametrize(
    ("text", "images", "error"),
    [
        ("<image><image>", 1, "the prompt has 2 <image> marks for 1 image: "),
        ("<image>", 2, "the prompt has 1 <image> mark for 2 images: "),
        ("no mark", 1, "the prompt has 0 <image> marks for 1 image: "),
        ("<image>", 0, "the prompt has 1 <image> mark for 0 images: "),
    ],
)
def test_match_images_refuses(text: str, images: int, error: str) -> None:
    with pytest.raises(UserError, match=error):
        split_at_images(text, images)
