"""What never ends in a stranger's tokenizer or chat template ends as a sentence, busy or blocked."""

import shutil
import time

import pytest

from draft_model import workers
from draft_model.errors import DraftModelError
from draft_model.regenerate.conversation import WriterSettings, converse
from draft_model.workers import Workers

SENTENCE = (
    r"chat template or tokenizer does not end: it took more than {} s of CPU time, {} s in all or 8 GiB of memory"
)


def test_a_template_that_never_ends_stops_the_regeneration(models, tmp_path):
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    model = shutil.copytree(models["qwen2"], tmp_path / "model")
    with (model / "chat_template.jinja").open("a") as template:
        template.write(f"{{% if messages[0].content == 'evil' %}}{loops}{{% endif %}}")
    settings = WriterSettings(model, "qwen", 100, 10)
    line = '{"messages": [{"role": "user", "content": "%s"}, {"role": "assistant", "content": "yes"}]}'
    with Workers(limits=workers.Limits(cpu=1)) as worker:
        assert worker.call(converse, settings, (line % "good").encode(), "", "1", [])[1] == 10
        with pytest.raises(DraftModelError, match=SENTENCE.format(1, 1200)):
            worker.call(converse, settings, (line % "evil").encode(), "", "2", [])


def test_whoever_stops_a_run_does_not_wait_for_a_call_to_end():
    def calls():
        yield 0, (600,)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Workers() as worker:
        list(worker.map(time.sleep, calls()))
