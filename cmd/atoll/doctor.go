package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/runtime/microvm/qemu"
	"github.com/atoll-run/atoll/sandbox"
)

// finding is what one check found.
type finding struct {
	Check  string `json:"check"`
	Status string `json:"status"` // "ok", "limited" or "failed"
	Detail string `json:"detail"`
	Fix    string `json:"fix,omitempty"` // what to do about it
}

const (
	checkOK      = "ok"
	checkLimited = "limited" // works, with less
	checkFailed  = "failed"  // atoll cannot do its job
)

// host is what the checks look at.
type host struct {
	root       bool
	kernel     string
	memory     uint64 // bytes
	disk       uint64 // bytes free where the state is
	diskErr    error
	cgroup     string            // "v2", "v1" or "" for none
	tools      map[string]bool   // programs that are there
	kvm        bool              // /dev/kvm can be opened
	landlock   bool              // the kernel has it
	guest      error             // why there is no guest agent; nil: there is one
	node       error             // why no node could be opened; nil: one was
	daemonURL  string            // empty without one
	networkErr string            // why sandboxes have no network of their own
	runtimes   map[string]string // name to why it cannot be used; empty: it can
}

// lookAtHost reads what diagnose needs.
func (a *app) lookAtHost(ctx context.Context) host {
	h := host{root: os.Geteuid() == 0, tools: map[string]bool{}, runtimes: map[string]string{}}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		h.kernel = unix.ByteSliceToString(u.Release[:])
	}
	var info unix.Sysinfo_t
	if unix.Sysinfo(&info) == nil {
		h.memory = info.Totalram * uint64(info.Unit)
	}
	var fs unix.Statfs_t
	dir := a.home
	if _, err := os.Stat(dir); err != nil {
		dir = "/"
	}
	if h.diskErr = unix.Statfs(dir, &fs); h.diskErr == nil {
		h.disk = fs.Bavail * uint64(fs.Bsize)
	}
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err == nil {
		h.cgroup = "v2"
	} else if _, err := os.Stat("/sys/fs/cgroup/memory"); err == nil {
		h.cgroup = "v1"
	}
	for _, tool := range []string{"git", "mmdebstrap", qemu.Program} {
		_, err := exec.LookPath(tool)
		h.tools[tool] = err == nil
	}
	if f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0); err == nil {
		h.kvm = true
		f.Close()
	}
	lsm, _ := os.ReadFile("/sys/kernel/security/lsm")
	abi, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	h.landlock = strings.Contains(string(lsm), "landlock") || errno == 0 && abi > 0
	_, h.guest = bundled(a.home, guestName)
	if h.guest == nil {
		_, h.guest = bundled(a.home, sentryName)
	}
	if h.guest == nil {
		a.lookAtNode(ctx, &h)
	}
	return h
}

func (a *app) lookAtNode(ctx context.Context, h *host) {
	b, err := a.open(ctx)
	if h.node = err; err != nil {
		return
	}
	h.daemonURL = a.daemonURL
	runtimes, err := b.Runtimes(ctx)
	if h.node = err; err != nil {
		return
	}
	for _, r := range runtimes {
		h.runtimes[r.Name] = r.Err
	}
	info, err := b.Info(ctx)
	h.node, h.networkErr = err, info.NetworkError
}

// Below these, work is possible but soon in the way of itself. In bytes.
const (
	littleMemory = 2 << 30
	littleDisk   = 10 << 30
)

// diagnose judges what was found. It is a function of the host alone.
func diagnose(h host) []finding {
	var all []finding
	say := func(check string, ok bool, otherwise, detail, fix string) {
		f := finding{Check: check, Status: checkOK, Detail: detail}
		if !ok {
			f.Status, f.Fix = otherwise, fix
		}
		all = append(all, f)
	}
	say("system", true, "", fmt.Sprintf("%s/%s, kernel %s, %d CPUs", runtime.GOOS, runtime.GOARCH, h.kernel, runtime.NumCPU()), "")
	say("rights", h.root, checkLimited, choose(h.root, "root", "not root: sandboxes have no network of their own and no limits that need cgroups"), "run it as root, or with sudo")
	say("memory", h.memory >= littleMemory, checkLimited, formatBytes(int64(h.memory)), "an idle sandbox takes some 10 MB; give the host 2 GiB or more")
	if h.diskErr != nil {
		say("disk", false, checkFailed, h.diskErr.Error(), "set ATOLL_HOME to a directory that exists")
	} else {
		say("disk", h.disk >= littleDisk, checkLimited, formatBytes(int64(h.disk))+" free", "free some, or set ATOLL_HOME to another disk; `atoll prune` removes what nothing needs")
	}
	say("limits", h.cgroup != "", checkLimited, choose(h.cgroup != "", "cgroup "+h.cgroup, "no cgroups: CPU, memory and processes are not limited"), "mount cgroup2 at /sys/fs/cgroup")
	say("guest agent and sentry", h.guest == nil, checkFailed, choose(h.guest == nil, "in this build", "missing"), "build with `make build`")
	if h.node != nil {
		say("node", false, checkFailed, causeOf(h.node), first(sandbox.HintOf(h.node), "run again with --debug"))
	} else if h.guest == nil {
		say("daemon", h.daemonURL != "", checkLimited, first(h.daemonURL, "none: only `atoll run` and what needs no sandbox that lasts"), "start one with `atoll up -d`")
	}
	all = append(all, diagnoseRuntimes(h)...)
	if h.node == nil && h.guest == nil {
		say("network", h.networkErr == "", checkLimited, first(h.networkErr, "sandboxes get addresses of their own"), "as root, on a kernel with nftables and veth; until then --network none or host")
	}
	say("git", h.tools["git"], checkLimited, choose(h.tools["git"], "there", "missing: no worktree sandboxes"), "apt install git")
	say("mmdebstrap", h.tools["mmdebstrap"], checkLimited, choose(h.tools["mmdebstrap"], "there", "missing: the image base cannot be made here"), "apt install mmdebstrap, or import an image: atoll image import FILE base")
	say("qemu", h.tools[qemu.Program], checkLimited, choose(h.tools[qemu.Program], "there", "missing: no microvm sandboxes"), "apt install --no-install-recommends qemu-system-x86")
	say("landlock", h.landlock, checkLimited, choose(h.landlock, "there", "missing: worktree sandboxes are held by namespaces alone"), "boot with lsm=landlock,... on a kernel from 5.13 on")
	say("hardware virtualisation", true, "", choose(h.kvm, "/dev/kvm is there; microvm uses it if a kernel really boots under it", "none, and none is needed: gvisor runs without, microvm emulates"), "")
	return all
}

func diagnoseRuntimes(h host) []finding {
	var all []finding
	usable := 0
	for _, name := range sortedKeys(h.runtimes) {
		f := finding{Check: "runtime " + name, Status: checkOK, Detail: "usable"}
		if why := h.runtimes[name]; why != "" {
			f.Status, f.Detail, f.Fix = checkLimited, why, "choose another with --runtime"
		} else {
			usable++
		}
		all = append(all, f)
	}
	if len(all) > 0 && usable == 0 {
		for i := range all {
			all[i].Status = checkFailed
		}
	}
	return all
}

func choose(ok bool, yes, no string) string {
	if ok {
		return yes
	}
	return no
}

func (a *app) doctorCommand() *cobra.Command {
	var f format
	cmd := &cobra.Command{
		Use: "doctor", Short: "Check what this host can do, and say what to do about the rest", Args: exact(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := f.check(); err != nil {
				return err
			}
			findings := diagnose(a.lookAtHost(cmd.Context()))
			if done, err := f.structured(a.stdout, findings); done {
				return err
			}
			_, color := isTerminal(a.stdout)
			return a.printFindings(findings, color)
		},
	}
	f.flags(cmd, "")
	return cmd
}

func (a *app) printFindings(findings []finding, color bool) error {
	marks := map[string]string{checkOK: "ok     ", checkLimited: "limited", checkFailed: "FAILED "}
	colors := map[string]string{checkOK: "32", checkLimited: "33", checkFailed: "31"}
	failed := false
	for _, f := range findings {
		mark := marks[f.Status]
		if color {
			mark = "\x1b[" + colors[f.Status] + "m" + mark + "\x1b[0m"
		}
		fmt.Fprintf(a.stdout, "%s  %-24s %s\n", mark, f.Check, printable(f.Detail))
		if f.Fix != "" {
			fmt.Fprintf(a.stdout, "%33s  > %s\n", "", f.Fix)
		}
		failed = failed || f.Status == checkFailed
	}
	if failed {
		return exitError(1)
	}
	return nil
}
