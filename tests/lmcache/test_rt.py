import sys; sys.path.insert(0,'/work/wt/serving')
import torch, pytest
def test_rt(contexts):
    kv, q = contexts
    t=torch.randn(2,30,130,192); ids=list(range(130))
    print(kv.store(t, ids)); g=kv.retrieve(ids); print(g.shape, torch.equal(g,t[:,:,:128]))
    t=torch.randn(1,30,130,576)
    try:
        print(q.store(t, ids)); g=q.retrieve(ids); print(g.shape, torch.equal(g,t[:,:,:128]))
    except Exception as e: print("Q", type(e), e)
