package qemu

import (
	"fmt"
	"net"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// The sockets in a machine's directory. QEMU listens on them for as long as it
// lives, so that whoever comes later can take the machine over.
const (
	controlName = "qmp.sock"
	serialName  = "serial.sock"
)

// at calls f with an address of the file called name in dir. Socket paths may
// not be longer than 107 bytes, so it goes through a descriptor of the directory.
func at(dir, name string, f func(unix.Sockaddr) error) error {
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open the machine's directory: %w", err)
	}
	defer unix.Close(fd)
	return f(&unix.SockaddrUnix{Name: fmt.Sprintf("/proc/self/fd/%d/%s", fd, name)})
}

// listen makes a socket in dir for QEMU to listen on.
func listen(dir, name string) (*os.File, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), name)
	_ = os.Remove(filepath.Join(dir, name))
	if err = at(dir, name, func(addr unix.Sockaddr) error { return unix.Bind(fd, addr) }); err == nil {
		err = unix.Listen(fd, 4)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("make %s: %w", name, err)
	}
	return f, nil
}

// dial connects to a socket in dir.
func dial(dir, name string) (*net.UnixConn, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close() // FileConn takes a descriptor of its own
	if err := at(dir, name, func(addr unix.Sockaddr) error { return unix.Connect(fd, addr) }); err != nil {
		return nil, fmt.Errorf("connect to %s: %w", name, err)
	}
	conn, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	unixConn, ok := conn.(*net.UnixConn)
	if !ok {
		conn.Close()
		return nil, fmt.Errorf("%s is no unix socket", name)
	}
	return unixConn, nil
}
