package sentry

import (
	"errors"
	"fmt"
	"path"
	"reflect"

	"gvisor.dev/gvisor/pkg/abi/linux"
	"gvisor.dev/gvisor/pkg/context"
	"gvisor.dev/gvisor/pkg/control/server"
	"gvisor.dev/gvisor/pkg/fspath"
	"gvisor.dev/gvisor/pkg/sentry/control"
	"gvisor.dev/gvisor/pkg/sentry/kernel"
	"gvisor.dev/gvisor/pkg/sentry/kernel/auth"
	"gvisor.dev/gvisor/pkg/sentry/socket/netstack"
	"gvisor.dev/gvisor/pkg/sentry/vfs"
	"gvisor.dev/gvisor/pkg/usermem"
	"gvisor.dev/gvisor/runsc/boot"

	"github.com/atoll-run/atoll/runtime/gvisor/orders"
)

// Inside is the control calls that we add to gVisor's own. It lives in the
// sentry; its methods are called over the control socket. gVisor has calls like
// Connect and Checkpoint, but its connections lose bytes when the guest reads
// slowly, know no half-close, and make a checkpoint fail while they are open.
type Inside struct {
	kernel     *kernel.Kernel
	checkpoint func(*control.SaveOpts) error
	forwards   forwards
}

// serveInside registers the calls once the guest runs. Connections that a
// snapshot was taken with have lost their other end; it ends them.
func serveInside(l *boot.Loader) error {
	// gVisor does not export its server, so a change of these names must show at
	// once: every sandbox fails to start.
	loader := reflect.ValueOf(l).Elem()
	k, ctrl := loader.FieldByName("k"), loader.FieldByName("ctrl")
	if !k.IsValid() || !ctrl.IsValid() {
		return errors.New("this version of gVisor keeps its kernel or controller elsewhere")
	}
	srv, manager := ctrl.Elem().FieldByName("srv"), ctrl.Elem().FieldByName("manager")
	if !srv.IsValid() || !manager.IsValid() {
		return errors.New("this version of gVisor keeps its control server elsewhere")
	}
	checkpoint := reflect.NewAt(manager.Type().Elem(), manager.UnsafePointer()).MethodByName("Checkpoint")
	in := &Inside{
		kernel: (*kernel.Kernel)(k.UnsafePointer()),
		checkpoint: func(o *control.SaveOpts) error {
			out := checkpoint.Call([]reflect.Value{reflect.ValueOf(o), reflect.ValueOf(new(struct{}))})
			err, _ := out[0].Interface().(error)
			return err
		},
	}
	stack, ok := in.kernel.RootNetworkNamespace().Stack().(*netstack.Stack)
	if !ok {
		return errors.New("the sandbox does not use gVisor's network stack")
	}
	in.forwards.init(stack.Stack)
	(*server.Server)(srv.UnsafePointer()).Register(in)
	return nil
}

// Connect joins a socket with a TCP port on the sandbox's loopback.
func (in *Inside) Connect(args *orders.Connect, _ *struct{}) error {
	if len(args.Files) != 1 {
		return errors.New("want one socket")
	}
	return in.forwards.connect(args.Files[0], args.Port)
}

// Save checkpoints the sandbox. Connections stand still meanwhile, for what
// waits on them cannot be saved, and go on afterwards.
func (in *Inside) Save(args *control.SaveOpts, _ *struct{}) error {
	resume := in.forwards.suspend()
	defer resume()
	return in.checkpoint(args)
}

// Identify sets the host name and writes files, which the guest itself may not
// be allowed to do. It replaces whatever has a file's name.
func (in *Inside) Identify(args *orders.Identify, _ *struct{}) error {
	ctx := in.kernel.SupervisorContext()
	leader := in.kernel.GlobalInit().Leader()
	if leader == nil {
		return errors.New("the sandbox has ended")
	}
	leader.UTSNamespace().SetHostName(ctx, args.Hostname)
	mounts := leader.MountNamespace()
	if mounts == nil {
		return errors.New("the sandbox is ending")
	}
	root := mounts.Root(ctx)
	defer root.DecRef(ctx)
	for name, text := range args.Files {
		if err := in.writeFile(ctx, root, leader.Credentials(), name, text); err != nil {
			return fmt.Errorf("write %s: %w", name, err)
		}
	}
	return nil
}

// writeFile replaces a file of the sandbox.
func (in *Inside) writeFile(ctx context.Context, root vfs.VirtualDentry, creds *auth.Credentials, name, text string) error {
	at := &vfs.PathOperation{Root: root, Start: root, Path: fspath.Parse(path.Clean("/" + name))}
	// A link may lead nowhere, as on systems with a resolver of their own.
	if stat, err := in.kernel.VFS().StatAt(ctx, creds, at, &vfs.StatOptions{Mask: linux.STATX_TYPE}); err == nil && stat.Mode&linux.S_IFMT != linux.S_IFREG {
		if err := in.kernel.VFS().UnlinkAt(ctx, creds, at); err != nil {
			return err
		}
	}
	file, err := in.kernel.VFS().OpenAt(ctx, creds, at, &vfs.OpenOptions{
		Flags: linux.O_WRONLY | linux.O_TRUNC | linux.O_CREAT, Mode: 0o644,
	})
	if err != nil {
		return err
	}
	defer file.DecRef(ctx)
	for data := []byte(text); len(data) > 0; {
		n, err := file.Write(ctx, usermem.BytesIOSequence(data), vfs.WriteOptions{})
		if err != nil {
			return err
		}
		data = data[n:]
	}
	return nil
}
