"""Chat templates in the manner of real models', as short as they can be, and one exchange each.

Each does what its family's does to roles, white space and ends; texts are our own.
"""

from dataclasses import dataclass

Said = dict[str, str]


@dataclass(frozen=True)
class Known:
    """A template, and what `MESSAGES` must become, up to where the assistant speaks again."""

    text: str
    bos: str
    eos: str
    rendered: str
    end: str


SYSTEM, ASKED = "Be brief.", "What is a till?"
ANSWERED, MORE = "A place for money.", " Where? \n"

MESSAGES: list[Said] = [
    {"role": "system", "content": SYSTEM},
    {"role": "user", "content": ASKED},
    {"role": "assistant", "content": ANSWERED},
    {"role": "user", "content": MORE},
]

CHATML = Known(
    text="""{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}""",
    bos="",
    eos="<|im_end|>",
    rendered=f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{ASKED}<|im_end|>\n"
    f"<|im_start|>assistant\n{ANSWERED}<|im_end|>\n<|im_start|>user\n{MORE}<|im_end|>\n"
    "<|im_start|>assistant\n",
    end="<|im_end|>",
)

LLAMA3 = Known(
    text="""{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'ipython' or 'tool_calls' in message %}
        {{- raise_exception('no tools here') }}
    {%- endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""",
    bos="<|begin_of_text|>",
    eos="<|eot_id|>",
    rendered="<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
    f"{SYSTEM}<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n{ASKED}<|eot_id|>"
    f"<|start_header_id|>assistant<|end_header_id|>\n\n{ANSWERED}<|eot_id|>"
    f"<|start_header_id|>user<|end_header_id|>\n\n{MORE.strip()}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    end="<|eot_id|>",
)

GEMMA = Known(
    text="""{{ bos_token }}{% if messages[0]['role'] == 'system' -%}
{{ raise_exception('System role not supported') }}{% endif -%}
{% for message in messages -%}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif -%}
{% set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor -%}
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}""",
    bos="<bos>",
    eos="<eos>",
    rendered=f"<bos><start_of_turn>user\n{ASKED}<end_of_turn>\n<start_of_turn>model\n"
    f"{ANSWERED}<end_of_turn>\n<start_of_turn>user\n{MORE.strip()}<end_of_turn>\n"
    "<start_of_turn>model\n",
    end="<end_of_turn>",
)

PHI3 = Known(
    text="{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ '<|system|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{% elif message['role'] == 'user' %}{{ '<|user|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '<|assistant|>\\n' + message['content'] + '<|end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}",
    bos="<s>",
    eos="<|endoftext|>",
    rendered=f"<|system|>\n{SYSTEM}<|end|>\n<|user|>\n{ASKED}<|end|>\n<|assistant|>\n"
    f"{ANSWERED}<|end|>\n<|user|>\n{MORE}<|end|>\n<|assistant|>\n",
    end="<|end|>",
)

QWEN3 = Known(
    text="""{%- set ns = namespace(last=messages|length - 1, seeking=true) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.seeking and message.role == "user" and message.content is string and
        not(message.content.startswith('<tool_response>')) %}
        {%- set ns.seeking = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role != "assistant" %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- else %}
        {%- set content = message.content %}
        {%- set thoughts = '' %}
        {%- if '</think>' in content %}
            {%- set thoughts = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last %}
            {{- '<think>\\n' + thoughts + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}""",
    bos="",
    eos="<|im_end|>",
    rendered=CHATML.rendered,
    end="<|im_end|>",
)

LLAMA2 = Known(
    text="{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    bos="<s>",
    eos="</s>",
    rendered=f"<s>[INST] {ASKED} [/INST] {ANSWERED} </s><s>[INST] {MORE.strip()} [/INST]",
    end="</s>",
)

ALL = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "gemma": GEMMA,
    "phi3": PHI3,
    "qwen3": QWEN3,
    "llama2": LLAMA2,
}
