package worktree

import (
	"errors"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/sandbox"
)

// verdict runs a filter on a system call, as the kernel would.
func verdict(t *testing.T, program []unix.SockFilter, arch, number, arg0, arg1 uint32) uint32 {
	t.Helper()
	data := map[uint32]uint32{dataArch: arch, dataNumber: number, dataArg0: arg0, dataArg1: arg1}
	var a uint32
	for pc := 0; pc < len(program); pc++ {
		in := program[pc]
		jump := func(holds bool) {
			if holds {
				pc += int(in.Jt)
			} else {
				pc += int(in.Jf)
			}
		}
		switch in.Code {
		case loadWord:
			a = data[in.K]
		case jumpEqual:
			jump(a == in.K)
		case jumpAtMin:
			jump(a >= in.K)
		case jumpSet:
			jump(a&in.K != 0)
		case ret:
			return in.K
		default:
			t.Fatalf("instruction %d is unknown: %+v", pc, in)
		}
	}
	t.Fatal("the filter does not end")
	return 0
}

// conformance: NFR1.3
func TestTheFilterDeniesWhatItSays(t *testing.T) {
	const arch = unix.AUDIT_ARCH_X86_64
	p := filter(arch)
	for _, number := range denied {
		if got := verdict(t, p, arch, number, 0, 0); got != filterEPERM {
			t.Errorf("system call %d gets %#x", number, got)
		}
	}
	const allow, kill = unix.SECCOMP_RET_ALLOW, unix.SECCOMP_RET_KILL_PROCESS
	for name, c := range map[string]struct{ arch, number, arg0, arg1, want uint32 }{
		"read":                 {arch, unix.SYS_READ, 0, 0, allow},
		"clone":                {arch, unix.SYS_CLONE, unix.CLONE_VM | unix.CLONE_NEWNS, 0, allow},
		"clone, new user":      {arch, unix.SYS_CLONE, unix.CLONE_NEWUSER | unix.CLONE_NEWNS, 0, filterEPERM},
		"clone3":               {arch, unix.SYS_CLONE3, 0, 0, errno | uint32(unix.ENOSYS)},
		"ioctl":                {arch, unix.SYS_IOCTL, 0, unix.TCGETS, allow},
		"ioctl, TIOCSTI":       {arch, unix.SYS_IOCTL, 0, tiocsti, filterEPERM},
		"another architecture": {unix.AUDIT_ARCH_I386, unix.SYS_READ, 0, 0, kill},
		"x32":                  {arch, x32Bit | unix.SYS_READ, 0, 0, kill},
	} {
		if got := verdict(t, p, c.arch, c.number, c.arg0, c.arg1); got != c.want {
			t.Errorf("%s gets %#x, want %#x", name, got, c.want)
		}
	}
	if len(p) > 255 {
		t.Errorf("the filter has %d instructions", len(p))
	}
}

func TestARefusedNamespaceSaysWhatToDo(t *testing.T) {
	err := namespaceError(os.ErrPermission)
	if !sandbox.Is(err, sandbox.Denied) || sandbox.HintOf(err) == "" {
		t.Errorf("got %v (kind %s)", err, sandbox.KindOf(err))
	}
	if other := errors.New("other"); !errors.Is(namespaceError(other), other) {
		t.Error("an error of another kind is explained by namespaces")
	}
}

func TestWithTheHostsNetworkItsPortsAreReached(t *testing.T) {
	repo, r := newRepo(t), open(t, t.TempDir())
	shared := t.TempDir()
	gitIn(t, repo, "clone", "-q", "--shared", repo, shared) // borrows its objects, as the sandbox then does twice
	a := start(t, r, shared, func(s *sandbox.Spec) { s.Network = sandbox.NetworkHost })
	if got, want := a.do("readlink /proc/self/ns/net; git log --format=%s; git fsck 2>&1 | grep -c missing"+"; true"), "first\n0\n"; !strings.HasSuffix(got, want) {
		t.Errorf("got %q, want the host's network and %q", got, want)
	} else if ours, err := os.Readlink("/proc/self/ns/net"); err != nil || !strings.HasPrefix(got, ours+"\n") {
		t.Errorf("the network is %q, want the host's %q", got, ours)
	}
	a.do(`setsid perl -MIO::Socket::INET -e '$s = IO::Socket::INET->new(Listen => 5, LocalAddr => "127.0.0.1", LocalPort => $ENV{ATOLL_PORT_BASE}, ReuseAddr => 1) or die; open(F, ">up"); close F; $c = $s->accept; print $c "hi\n"' >/dev/null 2>&1 </dev/null & while [ ! -e up ]; do sleep 0.05; done`)
	conn, err := r.Dial(t.Context(), a.id, firstBlock)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	got := make([]byte, 3)
	if _, err := conn.Read(got); err != nil || string(got) != "hi\n" {
		t.Errorf("read %q, %v", got, err)
	}
}
