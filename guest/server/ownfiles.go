package server

import (
	"os"
	"slices"
	"strings"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ownFiles are the files that tell a sandbox who it is. The zero value is ready.
//
// In a machine the files stay open. A clone is told who it is before anything else,
// when its emulator has translated none of the code for that yet, and to open and to
// close files is most of it: what the kernel does for a file that is gone included.
// For the same reason nothing here goes by Go's poller.
type ownFiles struct {
	// keep has files stay open. Nothing must be able to put others in their place:
	// in a machine they are mount points.
	keep bool

	mu   sync.Mutex
	open [ownFileCount]int // descriptors plus one; 0: not open
	name string            // the host name that was set last; empty: none
}

// Which files they are.
const (
	fileRandom = iota
	fileHostname
	fileHosts
	fileResolv
	ownFileCount
)

var ownPaths = [ownFileCount]string{"/dev/urandom", "/etc/hostname", "/etc/hosts", "/etc/resolv.conf"}

// maxHosts bounds how much of /etc/hosts is kept, in bytes.
const maxHosts = 1 << 20

// acquire returns a file's descriptor, which release gives back; s.mu is held.
func (s *ownFiles) acquire(file int) (fd int, err error) {
	if s.open[file] > 0 {
		return s.open[file] - 1, nil
	}
	flags := unix.O_RDWR | unix.O_CLOEXEC
	if file != fileRandom {
		flags |= unix.O_CREAT
	}
	if fd, err = unix.Open(ownPaths[file], flags, 0o644); err != nil {
		return -1, &os.PathError{Op: "open", Path: ownPaths[file], Err: err}
	}
	if s.keep {
		s.open[file] = fd + 1
	}
	return fd, nil
}

func (s *ownFiles) release(fd int) {
	if !s.keep {
		_ = unix.Close(fd)
	}
}

// rewrite makes a file hold text; s.mu is held.
func (s *ownFiles) rewrite(file int, text string) error {
	fd, err := s.acquire(file)
	if err != nil {
		return err
	}
	defer s.release(fd)
	old, err := unix.Seek(fd, 0, unix.SEEK_END)
	if err == nil {
		_, err = unix.Pwrite(fd, []byte(text), 0)
	}
	if err == nil && old > int64(len(text)) {
		err = unix.Ftruncate(fd, int64(len(text)))
	}
	if err != nil {
		return &os.PathError{Op: "write", Path: ownPaths[file], Err: err}
	}
	return nil
}

// setResolver has names resolved by a server.
func (s *ownFiles) setResolver(address string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.rewrite(fileResolv, "nameserver "+address+"\n")
}

// addEntropy credits seed to the kernel's pool and has the generator take it
// up at once: forks of one snapshot would otherwise draw the same numbers.
// Where crediting is not allowed, writing still mixes the seed in.
func (s *ownFiles) addEntropy(seed []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	fd, err := s.acquire(fileRandom)
	if err != nil {
		return err
	}
	defer s.release(fd)
	// struct rand_pool_info { int entropy_count (bits); int buf_size; u32 buf[]; }
	var info struct {
		bits, size int32
		buf        [maxEntropy]byte
	}
	info.bits, info.size = int32(len(seed)*8), int32(len(seed))
	copy(info.buf[:], seed)
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.RNDADDENTROPY, uintptr(unsafe.Pointer(&info)))
	if errno != 0 {
		_, err := unix.Write(fd, seed)
		return err
	}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.RNDRESEEDCRNG, 0); errno != 0 && errno != unix.EINVAL {
		return errno // EINVAL: a kernel before 5.18, which reseeds by itself
	}
	return nil
}

// setHostname names the sandbox, for its kernel and in its files.
func (s *ownFiles) setHostname(name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.keep && name == s.name {
		return nil // a machine is told by its runtime and again by /init
	}
	old, _ := os.Hostname()
	if err := unix.Sethostname([]byte(name)); err != nil {
		return err
	}
	if err := s.rewrite(fileHostname, name+"\n"); err != nil {
		return err
	}
	hosts, err := s.read(fileHosts)
	if err != nil {
		return err
	}
	if err := s.rewrite(fileHosts, renameHost(hosts, old, name)); err != nil {
		return err
	}
	s.name = name
	return nil
}

// read returns what a file holds; s.mu is held.
func (s *ownFiles) read(file int) (string, error) {
	fd, err := s.acquire(file)
	if err != nil {
		return "", err
	}
	defer s.release(fd)
	text := make([]byte, 0, 1024)
	for len(text) < maxHosts {
		n, err := unix.Pread(fd, text[len(text):cap(text)], int64(len(text)))
		if err != nil {
			return "", &os.PathError{Op: "read", Path: ownPaths[file], Err: err}
		}
		full := len(text)+n == cap(text)
		text = text[:len(text)+n]
		if !full {
			break
		}
		text = slices.Grow(text, len(text))
	}
	return string(text), nil
}

// renameHost makes name resolve to loopback in the text of /etc/hosts. The line
// of the old name, if we wrote one, is replaced.
func renameHost(hosts, old, name string) string {
	var out []string
	localhost := false
	for line := range strings.Lines(hosts) {
		f := strings.Fields(line)
		if len(f) >= 2 && f[0] == "127.0.1.1" && (f[1] == old || f[1] == name) {
			continue
		}
		localhost = localhost || (len(f) >= 2 && f[0] == "127.0.0.1")
		out = append(out, strings.TrimSuffix(line, "\n"))
	}
	if !localhost {
		out = append(out, "127.0.0.1\tlocalhost")
	}
	return strings.Join(append(out, "127.0.1.1\t"+name), "\n") + "\n"
}
