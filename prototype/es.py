import math, time, json, sys, os, torch, numpy as np
from tasks import *; import pop; from pop import Pop, NW, initial_weights
torch.set_num_threads(1)
LONGEST={'Seq':500,'Conv':800,'Restart':600,'Auto':1500,'Classify':2000,'Skip':1000}
def draw(seed, lo=50):
    t,d=sample(seed); hi=LONGEST.get(type(t).__name__,2000)
    if type(t).__name__=='Classify' and t.x.shape[1]>200: hi=800
    T=int(d.logu(lo,hi)); known=not d.p(.3); return t,T,known
def seeds(t,T,seed):
    return torch.Generator().manual_seed(seed*7+3)
def roll(t,T,seed,weights,known=True,base=None,lr=1.0):
    """losses (T,B) float64; inf after divergence."""
    g=seeds(t,T,seed); P=t.start(g); B=len(weights); q=Pop(P,B,weights,T if known else None,lr=lr,base=base); out=np.empty((T,B)); ps=list(q.p.values())
    jg=torch.Generator().manual_seed(seed+5)
    for k in range(T):
        l=t.losses(q.p,t.batch(g)); s=l.sum()
        if t.jitter: s=s*math.exp(t.jitter*torch.randn((),generator=jg).item())
        gr=torch.autograd.grad(s,ps); q.step(gr); out[k]=l.detach().numpy()
    return out
def roll_adamw(t,T,seed,lrs,known=True,wd=.01):
    g=seeds(t,T,seed); P=t.start(g); B=len(lrs); ps={k:v.unsqueeze(0).repeat(B,*[1]*v.dim()).requires_grad_() for k,v in P.items()}
    m={k:torch.zeros_like(v) for k,v in ps.items()}; v2={k:torch.zeros_like(v) for k,v in ps.items()}; out=np.empty((T,B)); L=torch.tensor(lrs)
    jg=torch.Generator().manual_seed(seed+5); W=max(1,.05*T)
    for k in range(T):
        l=t.losses(ps,t.batch(g)); s=l.sum()
        if t.jitter: s=s*math.exp(t.jitter*torch.randn((),generator=jg).item())
        gr=torch.autograd.grad(s,list(ps.values())); out[k]=l.detach().numpy()
        sched=min(1,(k+1)/W)*(.5*(1+math.cos(math.pi*k/T)) if known else 1)
        with torch.no_grad():
            for (n,p),x in zip(ps.items(),gr):
                lr=(L*sched).view(B,*[1]*(p.dim()-1)); m[n].lerp_(x,.1); v2[n].mul_(.999).addcmul_(x,x,value=.001)
                p.mul_(1-lr*wd).sub_(lr*(m[n]/(1-.9**(k+1)))/((v2[n]/(1-.999**(k+1))).sqrt()+1e-8))
    return out
def scores(out,known,first=None):
    """log final loss (mean of last 5-10%) and mean log loss over the run, relative to the first loss; bounded."""
    T=len(out); L0=np.nanmax([abs(out[0].mean()),1e-12]); x=np.where(np.isfinite(out),out,np.inf); x=np.clip(x/L0,-1e3,1e3)
    n=max(5,T//20); fin=np.log(np.maximum(x[-n:].mean(0),0)+1e-6)
    k=np.unique(np.geomspace(1,T,20).astype(int)); sm=[np.log(np.maximum(x[max(0,j-max(1,j//5)):j].mean(0),0)+1e-6) for j in k]
    return fin, np.mean(sm,0)
def fitness(out,known):
    f,c=scores(out,known); return (.8*f+.2*c) if known else (.5*f+.5*c)
LRS=[1e-4,3e-4,1e-3,3e-3,1e-2,3e-2]
def val_tasks(n=60): 
    r=[]
    for i in range(n):
        seed=10_000_000+i; t,T,known=draw(seed,lo=150); r.append((seed,t,T,known))
    return r
