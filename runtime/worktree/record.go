package worktree

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/runtime/supervisor"
	"github.com/atoll-run/atoll/sandbox"
)

// record is what is kept of a sandbox on disk, enough to find it again.
type record struct {
	Spec   sandbox.Spec
	Base   string // the commit that it started from
	Bases  string // the name of that commit's checkout
	Branch string // the branch inside, and the one that its work is published as
	// Objects are the object directories that it borrows from, numbered below
	// objectsDir by their place here.
	Objects []string
	UID     int // who it acts as
	GID     int
	Ports   int    // the first of its block
	PID     int    // of its first process, on the host
	Start   string // when that process started, so that a reused PID is told from it
	Paused  bool
}

// Files and directories of a sandbox, in its directory.
const (
	socketName = "guest.sock"
	layersName = "layers"    // upper and work, the layers of the working tree
	gitName    = "git"       // its git directory
	homeName   = "home"      // its /home/user
	tempName   = "tmp"       // its /tmp
	logName    = "agent.log" // what its agent said
)

// Paths inside a sandbox.
const (
	homeDir    = "/home/user"
	objectsDir = "/run/atoll/objects/" // the repository's objects, read-only, numbered
	guestPath  = "/run/atoll/guest"
)

func loadRecord(dir string) (rec record, err error) {
	if err := supervisor.ReadRecord(dir, &rec); err != nil {
		return rec, err
	}
	if rec.Spec.ID != filepath.Base(dir) || rec.Bases != filepath.Base(rec.Bases) {
		return rec, errors.New("the record is not that of its directory")
	}
	return rec, nil
}

// startOf tells when a process started: in clock ticks since boot, and which
// boot. Empty when there is no such process.
func startOf(pid int) string {
	text, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return ""
	}
	// The command stands in parentheses and may hold some itself.
	fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
	const startTime = 19 // of the fields after the command
	if len(fields) <= startTime || fields[0] == "Z" {
		return ""
	}
	return sysctl("kernel/random/boot_id") + " " + fields[startTime]
}

// portBlock is how many ports each sandbox is given, for servers that must not
// meet those of its siblings. Blocks lie below the range from which the kernel
// takes ports by itself.
const (
	portBlock  = 10
	firstBlock = 20000
	lastBlock  = 32000
)

// freePorts returns the first of a block of ports that nobody has.
func freePorts(taken map[int]bool) (int, bool) {
	for first := firstBlock; first < lastBlock; first += portBlock {
		if !taken[first] {
			return first, true
		}
	}
	return 0, false
}

// watchEnd calls ended once the process is gone. It holds no thread meanwhile:
// Go's poller waits for it. It fails when there is no such process.
func watchEnd(pid int, ended func()) error {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), "pidfd")
	raw, err := f.SyscallConn()
	if err != nil {
		f.Close()
		return err
	}
	go func() {
		defer f.Close()
		_ = raw.Read(func(fd uintptr) bool {
			fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
			n, err := unix.Poll(fds, 0)
			return n > 0 || err != nil && !errors.Is(err, unix.EINTR)
		})
		// Our own child waits to be collected; a daemon's before us is not ours.
		var status unix.WaitStatus
		_, _ = unix.Wait4(pid, &status, unix.WNOHANG, nil)
		ended()
	}()
	return nil
}
