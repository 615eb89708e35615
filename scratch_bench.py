import sys, torch, ctypes, statistics, time
from plugins.kernels import Module, cached_kernels, compile_kernels
from plugins.linear import cuda as L
from plugins.linear.cuda import *
from plugins.moe_experts import cuda as E
import os
W,R,D,G=(int(v) for v in os.environ.get("CFG","8,2,4,2").split(","))
L.WARPS,L.RESIDENT,L.DEPTH=W,G,D; E.WARPS,E.RESIDENT=W,G; WARPS=W
XD={"BLOCK_WARPS":W,"RESIDENT":R,"PIPELINE_DEPTH":D}
print("CONFIG",W,R,D)
torch.manual_seed(0)
cap=torch.cuda.get_device_capability(); arch=f"sm_{cap[0]}{cap[1]}"; SM=torch.cuda.get_device_properties(0).multi_processor_count
torch.zeros(1,device="cuda"); torch.cuda.synchronize(); t0=time.time()
mod=Module(compile_kernels(L.SOURCE, arch, {"NUM_EXPERTS":256,"TOP_K":8,**XD})); emod=Module(cached_kernels(E.SOURCE, arch, {"NUM_EXPERTS":256,"TOP_K":8,**XD}))
print("compile", time.time()-t0)
lin=LinearDecode(mod, SM); ex=E.ExpertsDecode(emod, SM, 256, 8)
def rnd(*s): return torch.randint(0,256,s,dtype=torch.uint8,device="cuda")
def scl(*s): return torch.randint(0x34,0x3D,s,dtype=torch.uint8,device="cuda")
keep=[]
def seg(fmt,n,k,out,stride=None,up=False,**f):
    def mk():
        if fmt==2:
            w=[rnd(n,k//2), scl(n,k//16), torch.full((1,),0.01,device="cuda")]
        elif fmt==1:
            w=[(torch.randn(n,k,device="cuda")*30).to(torch.float8_e4m3fn), None, torch.full((1,),0.001,device="cuda")]
        else: w=[(torch.randn(n,k,device="cuda")*0.02).bfloat16(),None,None]
        keep.append(w); return [t.data_ptr() if t is not None else None for t in w]
    a=mk(); s=Segment(weight=a[0],scale=a[1],scale_2=a[2],out=out.data_ptr(),out_stride=stride or n,n=n,format=fmt,**f)
    if up:
        b=mk(); s.weight_up,s.scale_up,s.scale_2_up=b
    return s
def bench(name, launches, nbytes):
    st=torch.cuda.Stream()
    with torch.cuda.stream(st):
        for l in launches: l(st.cuda_stream)
        torch.cuda.synchronize()
        g=torch.cuda.CUDAGraph()
        with torch.cuda.graph(g, stream=st):
            for l in launches: l(torch.cuda.current_stream().cuda_stream)
        for _ in range(3): g.replay()
        ts=[]
        for _ in range(15):
            a,b=torch.cuda.Event(enable_timing=True),torch.cuda.Event(enable_timing=True)
            a.record(); g.replay(); b.record(); torch.cuda.synchronize(); ts.append(a.elapsed_time(b)*1e3/len(launches))
    us=statistics.median(ts)
    print(f"{name:34s} {us:8.2f} us  {nbytes/us/1e3:8.0f} GB/s", flush=True)
    return us
a=torch.empty(1<<30,dtype=torch.uint8,device="cuda"); b=torch.empty_like(a)
for _ in range(2): b.copy_(a)
ev=[torch.cuda.Event(enable_timing=True) for _ in range(2)]
ev[0].record(); 
for _ in range(5): b.copy_(a)
ev[1].record(); torch.cuda.synchronize(); print("copy GB/s", 2*5*a.numel()/ev[0].elapsed_time(ev[1])/1e6); del a,b
H=2048; N=24
x=torch.randn(8,H,device="cuda"); nw=torch.randn(H,device="cuda")*0.1; mixed=torch.randn(8,4096,device="cuda"); ring=torch.randn(32,12384,device="cuda")
pos=torch.tensor([7],dtype=torch.int32,device="cuda"); logits=torch.empty(8,256,device="cuda"); sg=torch.empty(8,device="cuda")
act=torch.zeros(64,512,device="cuda"); sact=torch.zeros(8,512,device="cuda"); routing=torch.zeros(routing_bytes(8),dtype=torch.uint8,device="cuda"); counter=torch.zeros(1,dtype=torch.int32,device="cuda")
sq=torch.rand(8,32,4,device="cuda")*32
biglog=torch.empty(8,248320,device="cuda")
for T in ((1,3) if os.environ.get('T') is None else (int(os.environ['T']),)):
    print("T",T)
    def inp(): return Input(x=x.data_ptr(),norm_weight=nw.data_ptr(),epsilon=1e-6,x_stride=H,k=H,rows=T,position=pos.data_ptr())
    ls=[]
    for i in range(N):
        s=[seg(1,8192,H,ring,12384,ring_mask=31),seg(1,4096,H,ring,12384,ring_mask=31),seg(0,32,H,ring,12384,ring_mask=31),seg(0,32,H,ring,12384,ring_mask=31)]
        ls.append(lambda st,s=s: lin.linear(inp(),s,st))
    bench("in_proj FP8 12288x2048", ls, 12288*2048+64*4096); ls=[]
    for i in range(N):
        s=[seg(1,2048,4096,x,H,epilogue=ADD)]
        g=Input(x=mixed.data_ptr(),head_squares=sq.data_ptr(),epsilon=1e-6,x_stride=4096,head_dim=128,head_parts=4,k=4096,rows=T)
        ls.append(lambda st,s=s,g=g: lin.linear(g,s,st,residual=x.data_ptr()))
    bench("out_proj FP8 2048x4096 gated", ls, 2048*4096); ls=[]
    for i in range(N):
        s=[seg(1,2048,4096,x,H,epilogue=ADD)]
        g=Input(x=mixed.data_ptr(),x_stride=4096,k=4096,rows=T)
        ls.append(lambda st,s=s,g=g: lin.linear(g,s,st,residual=x.data_ptr()))
    bench("o_proj FP8 2048x4096 plain", ls, 2048*4096); ls=[]
    for i in range(N):
        s=[seg(0,256,H,logits),seg(2,512,H,sact,512,up=True,epilogue=SWIGLU,pack=2),seg(0,1,H,sg)]
        r=Routing(logits.data_ptr(),routing.data_ptr(),counter.data_ptr())
        ls.append(lambda st,s=s,r=r: lin.linear(inp(),s,st,routing=r))
    bench("router+shared", ls, 256*4096+1024*2048*9//16); rl=ls[0]; ls=[]
    ews=[]
    for i in range(8):
        ews.append(([rnd(256,1024,1024),scl(256,1024,128),torch.full((256,2),0.01,device="cuda")],[rnd(256,2048,256),scl(256,2048,32),torch.full((256,),0.01,device="cuda")],seg(2,2048,512,x)))
    torch.cuda.synchronize(); x.normal_(); rl(torch.cuda.current_stream().cuda_stream); torch.cuda.synchronize()
    distinct=int(routing.view(torch.int32)[0])
    ups=[]; downs=[]
    for gu,dn,sh in ews:
        ups.append(lambda st,gu=gu: ex.up(E.UpArguments(inp(),routing.data_ptr(),*[t.data_ptr() for t in gu],act.data_ptr(),2,512),st))
        downs.append(lambda st,dn=dn,sh=sh: ex.down(E.DownArguments(routing.data_ptr(),*[t.data_ptr() for t in dn],act.data_ptr(),sh,sact.data_ptr(),sg.data_ptr(),x.data_ptr(),2,512,512,2048,T),st))
    print("distinct", distinct)
    bench("experts up", ups, distinct*1024*2048*9//16)
    bench("experts down", downs, (distinct+1)*512*2048*9//16)
    bench("up+down", [f for p in zip(ups,downs) for f in p], (distinct+.5)*1.5*512*2048*9//16)
    chain=[]
    s=[seg(2,248320,H,biglog)]
    bench("lm_head", [lambda st,s=s: lin.linear(inp(),s,st)]*3, 248320*2048*9//16)
    del ews,ups,downs
    keep.clear()
