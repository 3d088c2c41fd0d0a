package daemon

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/sandbox"
)

// Home is a state directory and the names of what lies in it.
type Home string

// DefaultHome is $ATOLL_HOME, or the place where the system keeps such state.
func DefaultHome() Home {
	if dir := os.Getenv("ATOLL_HOME"); dir != "" {
		return Home(dir)
	}
	if os.Geteuid() == 0 {
		return "/var/lib/atoll"
	}
	if dir, err := os.UserHomeDir(); err == nil {
		return Home(filepath.Join(dir, ".local", "share", "atoll"))
	}
	return Home(filepath.Join(os.TempDir(), "atoll-"+strconv.Itoa(os.Geteuid())))
}

func (h Home) path(elem ...string) string {
	return filepath.Join(append([]string{string(h)}, elem...)...)
}

// Images is where roots are kept; several processes may share it.
func (h Home) Images() string { return h.path("images") }

// Machines is where kernels and templates of microVMs are kept; several processes
// may share it.
func (h Home) Machines() string { return h.path("machines") }

// Credentials is the file that holds the root key.
func (h Home) Credentials() string { return h.path("credentials") }

// CA is the certificate that clients of a TLS daemon must trust.
func (h Home) CA() string { return h.path("tls", "ca.pem") }

// prefix distinguishes what this state directory makes on the host (links,
// tables, cgroups) from what others make. It fits a network interface's name.
func (h Home) prefix() string {
	abs, err := filepath.Abs(string(h))
	if err != nil { // the working directory is gone; the path as given still tells directories apart
		abs = string(h)
	}
	sum := sha256.Sum256([]byte(abs))
	return "at" + hex.EncodeToString(sum[:3])
}

// lock makes this process the only owner of the directory until the returned
// file is closed, also by a crash.
func (h Home) lock() (*os.File, error) {
	const op = "daemon.lock"
	if err := os.MkdirAll(string(h), 0o700); err != nil {
		return nil, sandbox.E(op, sandbox.Denied, string(h), err).WithHint("set ATOLL_HOME to a directory that you can write")
	}
	f, err := os.OpenFile(h.path("lock"), os.O_RDWR|os.O_CREATE|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, sandbox.E(op, sandbox.Denied, string(h), err)
	}
	// A lock of the open file description: it ends with this process however it
	// ends, and others can see that it is held without taking it.
	whole := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &whole); err != nil {
		_ = f.Close()
		if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EACCES) {
			return nil, sandbox.E(op, sandbox.Internal, string(h), err)
		}
		owner := ""
		if ep, err := h.Endpoint(); err == nil {
			owner = " (process " + strconv.Itoa(ep.PID) + " at " + ep.URL + ")"
		}
		return nil, sandbox.Errorf(op, sandbox.Conflict, string(h), "another atoll uses this state directory%s", owner).
			WithHint("stop it, or choose another directory with ATOLL_HOME")
	}
	return f, nil
}

// Endpoint is where a running daemon answers.
type Endpoint struct {
	PID    int    `json:"pid"`
	URL    string `json:"url"`
	Domain string `json:"domain"`
}

func (h Home) endpointFile() string { return h.path("daemon.json") }

// Endpoint reads where the daemon of this directory answers. It fails with
// NotFound when none runs.
func (h Home) Endpoint() (Endpoint, error) {
	const op = "daemon.Endpoint"
	var ep Endpoint
	data, err := os.ReadFile(h.endpointFile())
	if err != nil {
		return ep, sandbox.E(op, sandbox.NotFound, string(h), err)
	}
	if err := json.Unmarshal(data, &ep); err != nil {
		return ep, sandbox.E(op, sandbox.Internal, h.endpointFile(), err)
	}
	// A daemon that was killed leaves the file; it holds no lock any more.
	f, err := os.Open(h.path("lock"))
	if err != nil {
		return ep, sandbox.E(op, sandbox.NotFound, string(h), err)
	}
	defer f.Close()
	held := unix.Flock_t{Type: unix.F_RDLCK, Whence: io.SeekStart}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &held); err != nil {
		return ep, sandbox.E(op, sandbox.Internal, string(h), err)
	}
	if held.Type == unix.F_UNLCK {
		return ep, sandbox.Errorf(op, sandbox.NotFound, string(h), "the daemon that ran here is gone")
	}
	return ep, nil
}

// isFull reports whether an error is that of a full disk.
func isFull(err error) bool { return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) }

// overwrite replaces what a file holds in place.
func overwrite(path string, data []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(data, 0)
	if err == nil {
		err = f.Truncate(int64(len(data)))
	}
	return errors.Join(err, f.Close())
}

// writeFile replaces a file in one step, so that a reader never sees half of it.
func writeFile(path string, data []byte, mode os.FileMode) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".new-*")
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		_ = os.Remove(f.Name())
	}
	return err
}
