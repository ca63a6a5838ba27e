"""Extrapolation: larger networks than the mixture's, meta data only."""
from es import *
from pop import Opt
import torch.nn as nn
g0=torch.Generator()
def data28(): x,y=mnist(28); return x,y
class TNet(nn.Module):
    def __init__(s,V,w=96,depth=3,L=32,tied=True):
        super().__init__(); s.e=nn.Embedding(V,w); s.pos=nn.Parameter(.02*torch.randn(L,w)); nn.init.normal_(s.e.weight,std=.02)
        s.b=nn.ModuleList(nn.TransformerEncoderLayer(w,4,4*w,0.,batch_first=True,norm_first=True) for _ in range(depth)); s.n=nn.LayerNorm(w); s.tied=tied; s.m=nn.Transformer.generate_square_subsequent_mask(L)
    def forward(s,x):
        h=s.e(x)+s.pos
        for b in s.b: h=b(h,src_mask=s.m,is_causal=True)
        return s.n(h)@s.e.weight.T
class Res(nn.Module):
    def __init__(s,c=24):
        super().__init__(); cb=lambda i,o,st=1: nn.Sequential(nn.Conv2d(i,o,3,st,1,bias=False),nn.BatchNorm2d(o),nn.ReLU(),nn.Conv2d(o,o,3,1,1,bias=False),nn.BatchNorm2d(o))
        s.a=nn.Conv2d(1,c,3,2,1); s.b1=cb(c,c); s.b2=cb(c,c); s.h=nn.Linear(c,10)
    def forward(s,x): h=s.a(x).relu(); h=(h+s.b1(h)).relu(); h=(h+s.b2(h)).relu(); return s.h(h.mean((2,3)))
def grammar_text(V,seed,n=60000):
    g=torch.Generator().manual_seed(seed); tab=torch.softmax(2.*torch.randn(V,V,generator=g),-1); sw=torch.softmax(2.*torch.randn(V,V,generator=g),-1)
    a=torch.randint(V,(600,),generator=g); b=torch.randint(V,(600,),generator=g); out=[]
    for _ in range(n//600):
        c=torch.multinomial(.5*tab[a]+.5*sw[b],1,generator=g)[:,0]; out.append(c); a,b=b,c
    return torch.stack(out,1)
def tasks():
    x,y=data28(); ce=F.cross_entropy
    def im(N,flat=True,pool=0,noise=0.):
        X=F.avg_pool2d(x,pool) if pool else x
        def b(g):
            i=torch.randint(len(X),(N,),generator=g); yy=y[i]
            if noise: r=torch.rand(N,generator=g)<noise; yy=torch.where(r,torch.randint(10,(N,),generator=g),yy)
            return (X[i].flatten(1) if flat else X[i]),yy
        return b
    def teach(i,w,N):
        gg=torch.Generator().manual_seed(5); W1=torch.randn(i,64,generator=gg)/math.sqrt(i); W2=torch.randn(64,1,generator=gg)/8
        def b(g): X=torch.randn(N,i,generator=g); return X,torch.tanh(2*X@W1)@W2*2+.1*torch.randn(N,1,generator=g)
        return b
    txt=grammar_text(64,3)
    def lm(L,N):
        def b(g):
            i=torch.randint(600,(N,),generator=g); j=torch.randint(txt.shape[1]-L-1,(N,),generator=g); t=torch.stack([txt[a,c:c+L+1] for a,c in zip(i.tolist(),j.tolist())]); return t[:,:-1],t[:,1:]
        return b
    mlp=lambda *d,act=nn.ReLU: (lambda: nn.Sequential(*sum([[nn.Linear(a,b),act()] for a,b in zip(d[:-2],d[1:-1])],[]),nn.Linear(d[-2],d[-1])))
    mse=F.mse_loss; lmloss=lambda o,t: ce(o.flatten(0,1),t.flatten())
    return {'mlp1024':(mlp(784,1024,1024,10),im(64),ce,300),'teach1024':(mlp(64,1024,1024,1),teach(64,1024,64),mse,400),'mlp256x4':(mlp(784,256,256,256,256,10),im(64),ce,600),
            'mlp128 noise':(mlp(784,128,128,10),im(64,noise=.3),ce,1500),
            'lm96x3':(lambda:TNet(64),lm(32,16),lmloss,500),'resnet24':(Res,im(32,False,2),ce,400),'cnn':(lambda: nn.Sequential(nn.Conv2d(1,16,3,2,1),nn.ReLU(),nn.Conv2d(16,32,3,2,1),nn.ReLU(),nn.Flatten(),nn.Linear(32*49,128),nn.ReLU(),nn.Linear(128,10)),im(64,False),ce,500),
            'sine128':(None,None,mse,800)}
class Sine(nn.Module):
    def forward(s,x): return torch.sin(30*x)
def sine_net(w=128):
    l=[nn.Linear(2,w),nn.Linear(w,w),nn.Linear(w,w),nn.Linear(w,1)]; nn.init.uniform_(l[0].weight,-.5,.5)
    for q in l[1:]: b=math.sqrt(6/w)/30; nn.init.uniform_(q.weight,-b,b)
    return nn.Sequential(l[0],Sine(),l[1],Sine(),l[2],Sine(),l[3])
def sine_batch(g):
    X=torch.rand(256,2,generator=g)*2-1; return X,(torch.sin(9*X[:,:1])*torch.cos(21*X[:,1:])+.5*torch.sin(30*X[:,:1]+17*X[:,1:]))
TS=tasks(); TS['sine128']=(sine_net,sine_batch,F.mse_loss,800)
def run(name,make,seed=0,sched=True):
    build,batch,crit,T=TS[name]; torch.manual_seed(seed); m=build(); o=make(m.parameters(),T); g=torch.Generator().manual_seed(seed+1); L=[]
    s=torch.optim.lr_scheduler.LambdaLR(o,lambda t:min(1,(t+1)/(.05*T))*.5*(1+math.cos(math.pi*t/T))) if sched else None
    for _ in range(T):
        x,y=batch(g); l=crit(m(x),y); o.zero_grad(); l.backward(); o.step(); L.append(l.item())
        if s: s.step()
        if not math.isfinite(L[-1]): return 1e3
    n=max(10,T//20); return sum(L[-n:])/n
if __name__=='__main__':
    if sys.argv[1]=='ref':
        R=json.load(open('big_ref.json')) if os.path.exists('big_ref.json') else {}
        for n in TS:
            if n in R: continue
            t0=time.time(); R[n]={str(lr):run(n,lambda p,T:torch.optim.AdamW(p,lr)) for lr in (3e-4,1e-3,3e-3,1e-2)}
            for b in (.03,.1): R[n]['bb%g'%b]=run(n,lambda p,T:Opt(p,T,base=b),sched=False)
            print(n,R[n],time.time()-t0,flush=True); json.dump(R,open('big_ref.json','w'))
    else:
        R=json.load(open('big_ref.json'));
        for f in sys.argv[1:]:
            w=torch.load(f); rs=[]
            for n in TS:
                if n not in R: continue
                best=min(v for k,v in R[n].items() if k[0]!='b'); v=run(n,lambda p,T:Opt(p,T,w=w),sched=False); rs.append(v/best)
                print(f'{f} {n} {v:.4g} ratio {v/best:.3f}  bb.03 {R[n]["bb0.03"]/best:.3f} bb.1 {R[n]["bb0.1"]/best:.3f}',flush=True)
            print(f,'geo',math.exp(sum(map(math.log,rs))/len(rs)))
