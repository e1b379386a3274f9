import gc, pytest
from tests.train.test_profile import *
from tests.train.conftest import *
import d2v.metrics as M
@pytest.mark.parametrize("collect",[True,False])
def test_it(make_config, monkeypatch, collect):
    o=M.MetricsFile.write
    if collect: monkeypatch.setattr(M.MetricsFile,"write",lambda s,l:(gc.collect(),o(s,l))[1])
    config = make_config(run={"steps": 600, "log_every": 10, "checkpoint_every": 60}, data={"micro_batch": 2})
    m=[l["memory_bytes"]/2**20 for l in read_metrics(pretrain(config)/"metrics.jsonl")]
    print(collect,[round(x,1) for x in m[::3]])
