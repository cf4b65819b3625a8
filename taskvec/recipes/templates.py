"""Chat templates that a merge file may name, in the formats of the models that they are named after."""

from __future__ import annotations

_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' ~ message['role'] ~ '\\n' ~ message['content'] ~ '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_LLAMA3 = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' ~ message['role'] ~ '<|end_header_id|>\\n\\n' }}"
    "{{ message['content'] | trim ~ '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
_MISTRAL = (
    "{% set before = namespace(text='') %}"
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{% set before.text = message['content'] ~ '\\n\\n' %}"
    "{% elif message['role'] == 'user' %}"
    "{{ ' [INST] ' ~ before.text ~ message['content'] ~ ' [/INST]' }}{% set before.text = '' %}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' ~ message['content'] ~ eos_token }}"
    "{% else %}{{ raise_exception('the roles are system, user and assistant, found ' ~ message['role']) }}{% endif %}"
    "{% endfor %}"
)
_EXAONE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}{{ '[|system|][|endofturn|]\\n' }}{% endif %}"
    "{{ '[|' ~ message['role'] ~ '|]' ~ message['content'] }}"
    "{{ '\\n' if message['role'] == 'user' else '[|endofturn|]\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '[|assistant|]' }}{% endif %}"
)
_ALPACA = (
    "{% for message in messages %}"
    "{% if not loop.first %}{{ '\\n\\n' }}{% endif %}"
    "{% if message['role'] == 'system' %}{{ message['content'] | trim }}"
    "{% elif message['role'] == 'user' %}{{ '### Instruction:\\n' ~ message['content'] | trim }}"
    "{% elif message['role'] == 'assistant' %}{{ '### Response:\\n' ~ message['content'] | trim }}"
    "{% else %}{{ raise_exception('the roles are system, user and assistant, found ' ~ message['role']) }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\n### Response:\\n' }}{% endif %}"
)
# name -> template
TEMPLATES = {"alpaca": _ALPACA, "chatml": _CHATML, "exaone": _EXAONE, "llama3": _LLAMA3, "mistral": _MISTRAL}
