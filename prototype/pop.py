import ctypes, math, os, subprocess, numpy as np, torch
HERE=os.path.dirname(os.path.abspath(__file__))
def build():
    so=os.path.join(HERE,'libstep.so'); src=os.path.join(HERE,'step.cpp')
    if not os.path.exists(so) or os.path.getmtime(so)<os.path.getmtime(src):
        subprocess.check_call(['g++','-O3','-fno-math-errno','-fno-trapping-math','-fno-signed-zeros','-shared','-fPIC','-std=c++17','-o',so,src])
    return ctypes.CDLL(so)
LIB=build()
LIB.lo_step.restype=None
_s=(ctypes.c_int*4)(); LIB.lo_sizes(_s); F,H,D,K=list(_s)
NW=H*F+H+D*H+D+D*F
BASE=0.05; WARM=0.05; CAP=0.1; VEC=0.1
def nat(shape):
    if len(shape)<2: return VEC
    return min(CAP, max(1,math.prod(shape[1:]))**-0.5)
def initial_weights(seed=0):
    g=torch.Generator().manual_seed(seed); w=torch.zeros(NW); w[:H*F]=torch.randn(H*F,generator=g)/math.sqrt(F)*1.0
    return w
def _p(a): return a.ctypes.data_as(ctypes.c_void_p)
class Pop:
    """B copies; params dict name -> (B,*shape) leaf tensors."""
    def __init__(self, init, B, weights, total=None, lr=1.0, base=None, log=False):
        self.B=B; self.names=list(init); self.T=total or 0; self.base=BASE if base is None else base
        self.p={k:v.detach().float().unsqueeze(0).repeat(B,*[1]*v.dim()).contiguous().requires_grad_() for k,v in init.items()}
        self.w=weights.float().contiguous()  # (B, NW)
        assert self.w.shape==(B,NW)
        self.f={k:torch.zeros_like(v) for k,v in self.p.items()}; self.s={k:torch.zeros_like(v) for k,v in self.p.items()}; self.v={k:torch.zeros_like(v) for k,v in self.p.items()}
        m=B*len(self.names); self.m=m
        self.z=torch.zeros(m,K); self.t=0
        n=[];c=[];rms=[]
        for k in self.names:
            x=init[k]
            for b in range(B):
                n.append(x.numel()); fan=max(1,math.prod(x.shape[1:])) if x.dim()>1 else 1
                c.append([nat(x.shape),math.log(fan),float(x.dim()<2),float(lr[b]) if isinstance(lr,torch.Tensor) else lr,0.0,self.T,0.0]); rms.append(x.double().square().mean().sqrt().item())
        self.z[:,0]=torch.tensor(rms); self.n=np.array(n,dtype=np.int64); self.c=np.array(c)
        def ptrs(d,stride=True):
            return np.concatenate([np.array([d[k].data_ptr()+4*b*(d[k].numel()//B) for b in range(B)],dtype=np.int64) for k in self.names])
        self.pp,self.pf,self.ps,self.pv=map(ptrs,(self.p,self.f,self.s,self.v)); self._ptrs=ptrs
        self.pz=np.array([self.z.data_ptr()+4*K*i for i in range(m)],dtype=np.int64)
        self.pw=np.array([self.w.data_ptr()+4*NW*b for _ in self.names for b in range(B)],dtype=np.int64)
        self.off=[np.arange(B)*4*(self.p[k].numel()//B) for k in self.names]
        self.log=np.zeros((m,32)) if log else None
    def step(self,grads):
        grads=[g.contiguous() for g in grads]
        pg=np.concatenate([g.data_ptr()+o for g,o in zip(grads,self.off)]).astype(np.int64)
        self.c[:,6]=self.t
        LIB.lo_step(ctypes.c_int64(self.m),_p(self.n),_p(self.pp),_p(pg),_p(self.pf),_p(self.ps),_p(self.pv),_p(self.pz),_p(self.pw),_p(self.c),ctypes.c_double(1.0),ctypes.c_double(self.base),ctypes.c_double(WARM),_p(self.log) if self.log is not None else None)
        self.t+=1
class Opt(torch.optim.Optimizer):
    """Wrapper for cases: single copy."""
    def __init__(self,params,total=None,w=None,base=None,lr=1.0):
        super().__init__(params,dict(lr=lr)); self.total=total; self.pw=w; self.base=base; self.pops={}
    @torch.no_grad()
    def step(self,closure=None):
        for g in self.param_groups:
            for p in g['params']:
                if p.grad is None: continue
                if p not in self.pops:
                    self.pops[p]=Pop({'p':p},1,(self.pw if self.pw is not None else torch.zeros(NW))[None],self.total,base=self.base)
                q=self.pops[p]; q.p['p'].data.copy_(p[None]); q.c[:,3]=g['lr']; q.step([p.grad[None]]); p.copy_(q.p['p'][0])
