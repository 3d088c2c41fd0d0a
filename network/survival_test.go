package network

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"

	"github.com/atoll-run/atoll/sandbox"
)

const helperEnv = "ATOLL_NETWORK_TEST_HELPER"

// order is what a helper process is told to do, in helperEnv.
type order struct {
	Dial   string // connect there and print what is received
	Open   string // serve this directory, attach what Attach says, print "ready", wait
	Prefix string
	Attach map[string]sandbox.NetworkPolicy
}

// helper is the life of a process that a test starts.
func helper(raw string) int {
	var o order
	if err := json.Unmarshal([]byte(raw), &o); err != nil {
		return 2
	}
	var err error
	if o.Dial != "" {
		err = dialAndPrint(o.Dial)
	} else {
		err = openAndWait(o)
	}
	if err != nil {
		fmt.Println(sandbox.KindOf(err), err)
		return 1
	}
	return 0
}

func openAndWait(o order) error {
	n, err := Open(Config{Dir: o.Open, Prefix: o.Prefix, Prewarm: 3,
		Upstream: []netip.AddrPort{netip.MustParseAddrPort(resolverAddr + ":53")}})
	if err != nil {
		return err
	}
	for id, policy := range o.Attach {
		if _, err := n.Attach(context.Background(), id, policy); err != nil {
			return err
		}
	}
	fmt.Println("ready")
	select {}
}

func dialAndPrint(addr string) error {
	c, err := net.DialTimeout("tcp4", addr, 5*time.Second)
	if err != nil {
		return err
	}
	line, err := bufio.NewReader(c).ReadString('\n')
	fmt.Print(line)
	return err
}

// start runs a helper process and waits for its first line.
func start(t testing.TB, o order, as *syscall.SysProcAttr) (*exec.Cmd, string) {
	t.Helper()
	raw, err := json.Marshal(o)
	must(t, err)
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{helperEnv + "=" + string(raw)}
	cmd.SysProcAttr = as
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	line, err := bufio.NewReader(out).ReadString('\n')
	must(t, err)
	return cmd, strings.TrimSpace(line)
}

// inventory counts what this package may leave on a host.
func inventory(t testing.TB) string {
	t.Helper()
	links, err := netlink.LinkList()
	must(t, err)
	var have []string
	for _, l := range links {
		have = append(have, l.Attrs().Name)
	}
	names, err := filepath.Glob(netnsDir + "/*")
	must(t, err)
	have = append(have, names...)
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	must(t, err)
	have = append(have, fmt.Sprint(strings.Count(string(mounts), " "+netnsDir+"/"), " named namespaces"))
	c, err := nftables.New()
	must(t, err)
	tables, err := c.ListTables()
	must(t, err)
	for _, table := range tables {
		have = append(have, "table "+table.Name)
	}
	lo, err := netlink.LinkByName("lo")
	must(t, err)
	addrs, err := netlink.AddrList(lo, netlink.FAMILY_V4)
	must(t, err)
	for _, a := range addrs {
		have = append(have, a.String())
	}
	return strings.Join(have, "\n")
}

func same(t testing.TB, what, got, want string) {
	t.Helper()
	if got != want {
		t.Errorf("%s: got\n%s\nwant\n%s", what, got, want)
	}
}

// conformance: NFR1.3
func TestKilledNodeIsAdoptedAndSwept(t *testing.T) {
	w := newWorld(t)
	z := w.serveNames(t)
	w.serveWeb(t, siteA, "A")
	greet(t, w.ns, siteA+":"+port, "internet")
	z.set("good.example", siteA)
	before := inventory(t)
	dir := t.TempDir()
	policies := map[string]sandbox.NetworkPolicy{
		"open":  open,
		"named": {AllowOut: []string{"good.example"}},
		"lost":  open,
	}
	victim, line := start(t, order{Open: dir, Prefix: "k", Attach: policies}, nil)
	if line != "ready" {
		t.Fatal(line)
	}
	must(t, victim.Process.Kill())
	_ = victim.Wait()

	// A second kill comes before a link is finished, and records are damaged.
	l := newLinks("k", DefaultPool)
	half, err := l.create(defaultMTU)
	must(t, err)
	must(t, unbindNetNS(l.netns(half)))
	for name, content := range map[string]string{"torn": "{", "bare": `{"id":"bare"}`, "other": `{"id":"open"}`, "odd": `{"id":"odd","link":{"address":"::1/3"}}`} {
		must(t, os.WriteFile(filepath.Join(dir, "attachments", name+".json"), []byte(content), 0o600))
	}

	n, err := Open(Config{Dir: dir, Prefix: "k", Upstream: []netip.AddrPort{netip.MustParseAddrPort(resolverAddr + ":53")}})
	must(t, err)
	byID := map[string]Attachment{}
	for _, a := range n.List() {
		byID[a.ID] = a
	}
	if len(byID) != len(policies) {
		t.Fatalf("adopted %v", byID)
	}
	reaches(t, byID["open"].Link.NetNS, siteA+":"+port, "internet")
	refused(t, byID["open"].Link.NetNS, privateAddr+":"+port)
	gets(t, byID["named"].Link.NetNS, siteA, "good.example", "A")
	getsNothing(t, byID["named"].Link.NetNS, siteA, "bad.example")
	links, err := n.links.list()
	must(t, err)
	if len(links) != len(policies) {
		t.Errorf("%d links are left of %d", len(links), len(policies))
	}
	must(t, n.Update(t.Context(), "named", open))
	reaches(t, byID["named"].Link.NetNS, siteA+":"+port, "internet")

	must(t, n.Sweep(map[string]bool{"open": true, "named": true}))
	if got := n.List(); len(got) != 2 || got[0].ID != "named" || got[1].ID != "open" {
		t.Errorf("after the sweep: %v", got)
	}
	must(t, n.Sweep(nil))
	must(t, n.Close())
	same(t, "left on the host", inventory(t), before)
}

// conformance: NFR1.3
func TestNothingLeaksAfterAHundredAttachments(t *testing.T) {
	newWorld(t)
	before := inventory(t)
	n, err := Open(Config{Dir: t.TempDir(), Prefix: "leak", Prewarm: 4})
	must(t, err)
	empty := len(n.List())
	var running sync.WaitGroup
	for worker := range 10 {
		running.Go(func() {
			for i := range 10 {
				id := fmt.Sprintf("w%di%d", worker, i)
				policy := sandbox.NetworkPolicy{Internet: i%2 == 0, AllowOut: []string{siteA, "a.example", hostAddr}}
				_, err := n.Attach(t.Context(), id, policy)
				if err == nil {
					err = n.Update(t.Context(), id, open)
				}
				if err == nil && i%3 > 0 {
					err = n.Detach(t.Context(), id)
				}
				if err == nil {
					err = n.Detach(t.Context(), "unknown")
				}
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	running.Wait()
	if got := len(n.List()) - empty; got != 40 {
		t.Errorf("%d attachments, want 40", got)
	}
	must(t, n.Sweep(nil))
	must(t, n.Close())
	same(t, "left on the host", inventory(t), before)
}

func TestFlushedFirewallIsWrittenAgain(t *testing.T) {
	w := newWorld(t)
	n := openNetwork(t, "a", nil)
	greet(t, w.ns, siteA+":"+port, "internet")
	greet(t, w.ns, privateAddr+":"+port, "private")
	l := attach(t, n, "one", open)
	c, err := nftables.New()
	must(t, err)
	for _, next := range []func() error{
		func() error { _, err := n.firewall.repair(); return err },
		func() error { _, err := n.Attach(t.Context(), "two", open); return err },
		func() error { return n.Update(t.Context(), "two", sandbox.NetworkPolicy{}) },
		func() error { return n.Detach(t.Context(), "two") },
	} {
		c.FlushRuleset() // as the restart of a firewall service does
		must(t, c.Flush())
		must(t, next())
		reaches(t, l.NetNS, siteA+":"+port, "internet")
		refused(t, l.NetNS, privateAddr+":"+port)
	}
}

func TestForwardingIsOpenedAsFarAsNeededOnly(t *testing.T) {
	newWorld(t)
	cfg := Config{Dir: t.TempDir(), Prefix: "a"}
	n, err := Open(cfg)
	must(t, err)
	other, err := Open(Config{Dir: t.TempDir(), Prefix: "b"})
	must(t, err)
	l := attach(t, n, "one", open)
	check := func(what string, closed ...string) {
		t.Helper()
		must(t, n.tendForwarding())
		if on, err := forwards("wan0"); err != nil || !on {
			t.Errorf("%s: the outward device forwards: %v, %v", what, on, err)
		}
		if !slices.Equal(n.firewall.closed, closed) {
			t.Errorf("%s: closed devices: %v", what, n.firewall.closed)
		}
	}
	check("at first", "wan0")
	if on, err := forwards("all"); err != nil || on {
		t.Errorf("the host was made a router: %v, %v", on, err)
	}
	must(t, setSysctl("ipv4/ip_forward", "1")) // by its owner
	check("a router")
	must(t, setSysctl("ipv4/ip_forward", "0")) // switches every device off
	check("no router any more", "wan0")
	if on, err := forwards(block(l.Address.Masked()).device()); err != nil || !on {
		t.Errorf("the sandbox is cut off: %v, %v", on, err)
	}
	must(t, n.Detach(t.Context(), "one"))
	must(t, n.Close())
	if on, err := forwards("wan0"); err != nil || !on {
		t.Errorf("the other node is cut off: %v, %v", on, err)
	}
	must(t, other.Close())
	if on, err := forwards("wan0"); err != nil || on {
		t.Errorf("afterwards the outward device forwards: %v, %v", on, err)
	}
	if again, err := Open(cfg); err != nil || again.Close() != nil {
		t.Error(err)
	}
}

func TestOtherFirewallsInTheWayAreNamed(t *testing.T) {
	newWorld(t)
	c, err := nftables.New()
	must(t, err)
	table := c.AddTable(&nftables.Table{Name: "engine", Family: nftables.TableFamilyIPv4})
	policy := nftables.ChainPolicyDrop
	c.AddChain(&nftables.Chain{Name: "FORWARD", Table: table, Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookForward, Priority: nftables.ChainPriorityFilter, Policy: &policy})
	must(t, c.Flush())
	t.Cleanup(func() { c.DelTable(table); must(t, c.Flush()) })
	var log strings.Builder
	openNetwork(t, "a", func(c *Config) { c.Log = slog.New(slog.NewTextHandler(&log, nil)) })
	if !strings.Contains(log.String(), "engine/FORWARD") {
		t.Errorf("the log says nothing of it: %s", &log)
	}
}

func TestDirectoryIsServedByOneProcess(t *testing.T) {
	newWorld(t)
	n := openNetwork(t, "a", nil)
	_, line := start(t, order{Open: n.cfg.Dir, Prefix: "a"}, nil)
	if !strings.HasPrefix(line, string(sandbox.Conflict)) {
		t.Errorf("got %q", line)
	}
}

func TestWithoutPrivilegeTheErrorSaysWhatHelps(t *testing.T) {
	needPrivilege(t) // to have some to give away
	dir := t.TempDir()
	must(t, os.Chmod(filepath.Dir(dir), 0o777))
	must(t, os.Chmod(dir, 0o777))
	_, line := start(t, order{Open: dir, Prefix: "a"}, &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}})
	if !strings.HasPrefix(line, string(sandbox.Denied)) || !strings.Contains(line, "network mode none") {
		t.Errorf("got %q", line)
	}
}

func TestMisuseIsRefused(t *testing.T) {
	newWorld(t)
	n := openNetwork(t, "a", func(c *Config) { c.Pool = netip.MustParsePrefix("198.18.7.0/26") })
	ctx := t.Context()
	attach(t, n, "one", open)
	_, err := n.Attach(ctx, "one", open)
	kind(t, "twice", err, sandbox.Exists)
	_, err = n.Attach(ctx, "../evil", open)
	kind(t, "bad id", err, sandbox.Invalid)
	_, err = n.Attach(ctx, "two", sandbox.NetworkPolicy{AllowOut: []string{"?"}})
	kind(t, "bad policy", err, sandbox.Invalid)
	kind(t, "update of nothing", n.Update(ctx, "two", open), sandbox.NotFound)
	kind(t, "bad update", n.Update(ctx, "one", sandbox.NetworkPolicy{DenyOut: []string{"?"}}), sandbox.Invalid)
	for i := 1; ; i++ {
		if _, err = n.Attach(ctx, fmt.Sprint("s", i), open); err != nil {
			if i != 12 { // 16 blocks, 4 of them for services, one for "one"
				t.Errorf("the pool was full at %d", i)
			}
			break
		}
	}
	kind(t, "full pool", err, sandbox.Exhausted)
	must(t, n.Detach(ctx, "one"))
	attach(t, n, "again", open)
	for _, c := range []Config{{}, {Dir: t.TempDir()}, {Dir: t.TempDir(), Prefix: "UPPER"},
		{Dir: t.TempDir(), Prefix: "p", Pool: netip.MustParsePrefix("10.0.0.0/30")},
		{Dir: t.TempDir(), Prefix: "p", Pool: netip.MustParsePrefix("fd00::/64")},
		{Dir: t.TempDir(), Prefix: "p", Prewarm: -1}} {
		_, err := Open(c)
		kind(t, fmt.Sprintf("%+v", c), err, sandbox.Invalid)
	}
}

func TestFailedOpenLeavesNothing(t *testing.T) {
	newWorld(t)
	small := func(c *Config) { c.Pool = netip.MustParsePrefix("198.18.7.0/26") }
	for _, prefix := range []string{"a", "b", "c", "d"} {
		openNetwork(t, prefix, small)
	}
	before := inventory(t)
	cfg := Config{Dir: t.TempDir(), Prefix: "e"}
	small(&cfg)
	_, err := Open(cfg)
	kind(t, "no service address is left", err, sandbox.Exhausted)
	same(t, "left on the host", inventory(t), before)
}

func kind(t testing.TB, what string, err error, want sandbox.Kind) {
	t.Helper()
	if !sandbox.Is(err, want) {
		t.Errorf("%s: got %v, want %s", what, err, want)
	}
}

func TestLargestPolicyFitsTheKernel(t *testing.T) {
	w := newWorld(t)
	n := openNetwork(t, "a", nil)
	greet(t, w.ns, siteA+":"+port, "internet")
	var p sandbox.NetworkPolicy
	p.Internet = true
	for i := range maxEntries {
		p.AllowOut = append(p.AllowOut, fmt.Sprintf("10.%d.%d.1", i/250, i%250))
		p.DenyOut = append(p.DenyOut, fmt.Sprintf("20.%d.%d.0/24", i/120, 2*(i%120)))
	}
	l := attach(t, n, "one", p)
	reaches(t, l.NetNS, siteA+":"+port, "internet")
	p.DenyOut[maxEntries-1] = siteA
	start := time.Now()
	must(t, n.Update(t.Context(), "one", p))
	t.Logf("measured: NFR1.3 update of %d entries %v", 2*maxEntries, time.Since(start).Round(time.Millisecond))
	refused(t, l.NetNS, siteA+":"+port)
}
