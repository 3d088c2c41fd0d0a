package gvisor

import (
	"context"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/unet"
	"gvisor.dev/gvisor/pkg/urpc"
)

// socketName is the sentry's control socket, in the sandbox's directory.
const socketName = "control.sock"

// call makes one control call to the sentry whose directory is dir. When ctx
// ends first, the connection is cut and ctx's error returned; the sentry may
// still carry the call out.
func call(ctx context.Context, dir, method string, arg, result any) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	sock, err := connect(dir)
	if err != nil {
		return err
	}
	client := urpc.NewClient(sock)
	defer client.Close()
	stop := context.AfterFunc(ctx, func() { _ = sock.Shutdown() })
	defer stop()
	err = client.Call(method, arg, result)
	if err != nil && ctx.Err() != nil {
		return ctx.Err()
	}
	return err
}

// connect opens the control socket.
func connect(dir string) (*unet.Socket, error) {
	fd, addr, done, err := controlSocket(dir)
	if err != nil {
		return nil, err
	}
	defer done()
	if err := unix.Connect(fd, addr); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("connect to control socket: %w", err)
	}
	return unet.NewSocket(fd)
}

// bindControl makes the control socket in dir and returns it for the sentry to
// listen on.
func bindControl(dir string) (*os.File, error) {
	fd, addr, done, err := controlSocket(dir)
	if err != nil {
		return nil, err
	}
	defer done()
	if err := unix.Bind(fd, addr); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("bind control socket: %w", err)
	}
	return os.NewFile(uintptr(fd), socketName), nil
}

// controlSocket returns a fresh socket and the address of dir's control socket,
// which is valid until done is called. The address goes through a descriptor of
// the directory, since socket paths may not be longer than 107 bytes.
func controlSocket(dir string) (fd int, addr unix.Sockaddr, done func(), err error) {
	dirFD, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, nil, nil, fmt.Errorf("open sandbox directory: %w", err)
	}
	fd, err = unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		unix.Close(dirFD)
		return -1, nil, nil, fmt.Errorf("make control socket: %w", err)
	}
	addr = &unix.SockaddrUnix{Name: fmt.Sprintf("/proc/self/fd/%d/%s", dirFD, socketName)}
	return fd, addr, func() { unix.Close(dirFD) }, nil
}
