package gvisor

import (
	"archive/tar"
	"bytes"
	"cmp"
	"path"
	"slices"
	"strconv"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/atoll-run/atoll/runtime/gvisor/orders"
	"github.com/atoll-run/atoll/sandbox"
)

// agentDir is where the guest agent is mounted in every sandbox.
const agentDir = "/.atoll"

// capabilities of root inside. CAP_SYS_ADMIN and CAP_SYS_RESOURCE are missing so
// that the limit of processes holds for root too.
var capabilities = []string{
	"CAP_AUDIT_WRITE", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_MKNOD",
	"CAP_NET_BIND_SERVICE", "CAP_SETFCAP", "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID",
	"CAP_SYS_CHROOT", "CAP_SYS_PTRACE",
}

// files are the host files from which a sandbox's file systems are made.
type files struct {
	root  string          // EROFS image
	agent string          // EROFS image with the guest agent as "guest"
	binds []sandbox.Mount // of the host root
}

// layout is everything the sentry must be told at boot, as values.
type layout struct {
	spec   *specs.Spec
	confs  []orders.MountConf
	images []string // EROFS files in the order in which the sentry takes them; "" is a gofer's socket
}

// needsGofer reports whether host directories are visible inside.
func (l layout) needsGofer() bool { return slices.Contains(l.images, "") }

// plan says in gVisor's words what a sandbox in dir is made of. The order of
// mounts counts: a snapshot can only be restored into the same. Nothing of one
// sandbox's own is in it, see sentry.identify.
func plan(f files, user []sandbox.Mount, res sandbox.Resources, dir string) layout {
	l := layout{
		images: []string{f.root},
		confs:  []orders.MountConf{{Lower: orders.LowerImage, Size: strconv.FormatInt(res.Disk, 10)}},
	}
	mounts := []specs.Mount{
		{Destination: "/proc", Type: "proc", Source: "proc"},
		{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"ro", "nosuid", "noexec", "nodev"}},
		{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "mode=755"}},
		{Destination: "/dev/pts", Type: "devpts", Source: "devpts"},
		{Destination: "/dev/shm", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "nodev", "mode=1777", "size=" + strconv.FormatInt(res.Memory/2, 10)}},
		{Destination: agentDir, Type: "erofs", Source: f.agent, Options: []string{"ro"}},
	}
	l.images = append(l.images, f.agent)
	l.confs = append(l.confs, orders.MountConf{Lower: orders.LowerImage})
	for _, b := range slices.Concat(f.binds, user) {
		m, image := mount(b)
		mounts = append(mounts, m)
		l.images = append(l.images, image)
		conf := orders.MountConf{Lower: orders.LowerGofer}
		if image != "" {
			conf.Lower = orders.LowerImage
		}
		l.confs = append(l.confs, conf)
	}
	limit := uint64(max(res.Pids-agentThreads, minPids))
	l.spec = &specs.Spec{
		Version:  specs.Version,
		Hostname: "sandbox",
		Root:     &specs.Root{Path: dir},
		Mounts:   mounts,
		Process: &specs.Process{
			Args: []string{agentDir + "/guest", "-listen", "tcp:" + strconv.Itoa(sandbox.GuestPort)},
			Env:  []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root"},
			Cwd:  "/",
			Capabilities: &specs.LinuxCapabilities{
				Bounding: capabilities, Effective: capabilities, Permitted: capabilities, Inheritable: capabilities,
			},
			Rlimits: []specs.POSIXRlimit{
				{Type: "RLIMIT_NPROC", Soft: limit, Hard: limit},
				{Type: "RLIMIT_NOFILE", Soft: 1 << 16, Hard: 1 << 20},
			},
		},
		Linux: &specs.Linux{Namespaces: []specs.LinuxNamespace{
			{Type: specs.PIDNamespace}, {Type: specs.IPCNamespace}, {Type: specs.UTSNamespace},
			{Type: specs.MountNamespace}, {Type: specs.NetworkNamespace},
		}},
	}
	return l
}

// mount translates one mount. image is its file when it is an EROFS image.
func mount(m sandbox.Mount) (out specs.Mount, image string) {
	if strings.HasSuffix(m.Source, ".erofs") {
		return specs.Mount{Destination: m.Target, Type: "erofs", Source: m.Source, Options: []string{"ro"}}, m.Source
	}
	access := "rw"
	if m.ReadOnly {
		access = "ro"
	}
	return specs.Mount{Destination: m.Target, Type: "bind", Source: m.Source, Options: []string{"rbind", access}}, ""
}

// checkSpec says what makes a spec impossible here that suits the capabilities.
func checkSpec(op string, s sandbox.Spec) error {
	invalid := func(format string, args ...any) error {
		return sandbox.Errorf(op, sandbox.Invalid, s.ID, format, args...)
	}
	switch {
	case s.Root.Kind == sandbox.RootEROFS && !path.IsAbs(s.Root.Path):
		return invalid("the path of an EROFS root must be absolute, not %q", s.Root.Path)
	case s.Resources.Memory > 0 && s.Resources.Memory < minMemory:
		return invalid("%d bytes of memory are fewer than the %d that a guest needs", s.Resources.Memory, minMemory)
	case s.Resources.Pids > maxPids:
		return invalid("%d processes are more than the sentry's %d", s.Resources.Pids, maxPids)
	}
	for _, m := range s.Mounts {
		if m.Target == agentDir || strings.HasPrefix(m.Target, agentDir+"/") {
			return invalid("mount at %q: %s belongs to the guest agent", m.Target, agentDir)
		}
	}
	return nil
}

const (
	minMemory = 16 << 20 // bytes
	maxPids   = 1 << 15  // half of what the sentry can have in all
	minPids   = 8        // fewer, and the agent cannot start a shell

	// agentThreads is how many threads the guest agent has. The sentry counts the
	// processes of each user by themselves, as Linux does, and most commands run as
	// another user than the agent; so its threads are set aside.
	agentThreads = 24
)

// tmpMarker is put into /tmp, since gVisor would mount memory over an empty one
// and the limit of disk would not hold there.
const tmpMarker = "tmp/.X11-unix"

// presets is a tar of what every root needs on top of its own files. The sentry
// unpacks it into the sandbox's overlay at the start.
var presets = func() []byte {
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, d := range []struct {
		name string
		mode int64
	}{{"./", 0o755}, {"./etc/", 0o755}, {"./tmp/", 0o1777}, {"./" + tmpMarker + "/", 0o1777}} {
		_ = w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: d.name, Mode: d.mode})
	}
	_ = w.Close() // a bytes.Buffer does not fail
	return buf.Bytes()
}()

// hostname is what a spec's sandbox is called inside.
func hostname(s sandbox.Spec) string { return cmp.Or(s.Hostname, s.ID) }

// ours reports whether a file of the overlay, named relative to the root, was put
// there by us and is no change that the sandbox made.
func ours(name string) bool {
	switch name {
	case "", "etc/hosts", "etc/hostname", "etc/resolv.conf", "proc", "sys", "dev", tmpMarker:
		return true
	}
	top, _, _ := strings.Cut(name, "/")
	return "/"+top == agentDir || top == "proc" || top == "sys" || top == "dev"
}
