package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/atoll-run/atoll/daemon"
	"github.com/atoll-run/atoll/sandbox"
)

func (a *app) upCommand() *cobra.Command {
	var cfg daemon.Config
	var volume size
	var runtimes string
	var pools []string
	var detach, logJSON bool
	uplink, memory, disk := size(0), size(daemon.DefaultCache.Memory), size(daemon.DefaultCache.Disk)
	cmd := &cobra.Command{
		Use: "up", Short: "Start the daemon: E2B's API, our own, and sandboxes that outlive commands", Args: exact(),
		Long: "Up serves one port: E2B's API, our own under /api, traffic to sandboxes, and /metrics. State is in --home. When\n" +
			"it ends, even by force, its sandboxes go on, and the next one finds them. The first start writes the root key\n" +
			"to credentials in --home.",
		Example: "  atoll up\n  atoll up -d --pool base=4\n  atoll up --site eu/frankfurt --store s3://snapshots\n  ATOLL_ADDR=0.0.0.0:7700 atoll up --tls --domain sandboxes.example.com",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if detach && os.Getenv(detached) == "" {
				return a.upDetached(cmd.Context())
			}
			base, err := a.config()
			if err != nil {
				return err
			}
			cfg.Home, cfg.Guest, cfg.Sentry, cfg.Version = base.Home, base.Guest, base.Sentry, base.Version
			cfg.Addr = first(a.addr, defaultAddr)
			cfg.Log = a.daemonLog(logJSON)
			cfg.VolumeSize = int64(volume)
			if runtimes != "" {
				cfg.Runtimes = strings.Split(runtimes, ",")
			}
			if cfg.Pools, err = parsePools(pools); err != nil {
				return err
			}
			cfg.Uplink, cfg.Cache.Memory, cfg.Cache.Disk = float64(uplink), int64(memory), int64(disk)
			cfg.Ready = func(ep daemon.Endpoint) { a.welcome(cfg, ep) }
			return daemon.Run(cmd.Context(), cfg)
		},
	}
	fl := cmd.Flags()
	fl.BoolVarP(&detach, "detach", "d", false, "in the background; its log is daemon.log in --home")
	fl.StringVar(&runtimes, "runtime", "", "the runtimes in order of preference: `gvisor,worktree`")
	fl.StringArrayVar(&pools, "pool", nil, "keep sandboxes ready: `TEMPLATE=NUMBER`")
	fl.Var(&volume, "volume-size", "how many `bytes` each volume may hold: 500M (default 10G)")
	fl.IntVar(&cfg.Prewarm, "prewarm", 2, "how many sandbox `kernels`, and machines of each template in demand, to start ahead of need")
	fl.StringVar(&cfg.Domain, "domain", "", "the `name` under which sandboxes are reached: {port}-{id}.NAME")
	fl.BoolVar(&cfg.TLS, "tls", false, "serve TLS, with a certificate of the home's own authority")
	fl.StringVar(&cfg.Name, "name", "", "the `name` by which other nodes know this one (default: the host's)")
	fl.Var(&uplink, "uplink", "the most that is sent to other nodes, in `bytes` a second: 12M")
	fl.StringVar(&cfg.Site, "site", "", "where this node is, `REGION/PLACE`: what comes from afar is fetched once for each")
	fl.StringVar(&cfg.Store, "store", "", "an object store to push to and pull from as `URL`: s3://BUCKET, azblob://CONTAINER, file:///DIR")
	fl.Var((*rules)(&cfg.Retention), "retain", "how long snapshots are kept that have no name and nothing needs, as `RULES`: last=3,age=30d,size=50G")
	fl.Var((*rules)(&cfg.Kept), "store-retain", "the same `RULES` for what is in the object store; default: for ever")
	fl.Var(&memory, "cache-memory", "how many `bytes` of fetched chunks to keep in memory")
	fl.Var(&disk, "cache-disk", "how many `bytes` of them to keep on disk")
	fl.StringVar(&cfg.Cache.Redis, "cache-redis", "", "a Redis that nodes share for them, as `URL`: redis://HOST:6379")
	fl.BoolVar(&logJSON, "log-json", false, "log as JSON lines")
	return cmd
}

func parsePools(pairs []string) (map[string]int, error) {
	m, err := parsePairs("pool", pairs)
	if err != nil {
		return nil, err
	}
	pools := make(map[string]int, len(m))
	for template, n := range m {
		if pools[template], err = strconv.Atoi(n); err != nil {
			return nil, usageError(template+"="+n, "write --pool base=4", "%q is no number", n)
		}
	}
	return pools, nil
}

func (a *app) daemonLog(asJSON bool) *slog.Logger {
	options := &slog.HandlerOptions{Level: slog.LevelInfo}
	if a.debug {
		options.Level = slog.LevelDebug
	}
	if asJSON {
		return slog.New(slog.NewJSONHandler(a.stderr, options))
	}
	return slog.New(slog.NewTextHandler(a.stderr, options))
}

// welcome says on a terminal how to use the daemon that now serves.
func (a *app) welcome(cfg daemon.Config, ep daemon.Endpoint) {
	cfg.Log.Info("serving", "url", ep.URL, "home", cfg.Home, "domain", ep.Domain, "version", cfg.Version)
	if _, terminal := isTerminal(a.stdout); !terminal {
		return
	}
	fmt.Fprintf(a.stdout, "\natoll serves %s\n\n  atoll run -it base -- bash\n\n  export E2B_API_KEY=$(cat %s) E2B_API_URL=%s E2B_SANDBOX_URL=%s   # for E2B's SDK\n", ep.URL, cfg.Home.Credentials(), ep.URL, ep.URL)
	if cfg.TLS {
		fmt.Fprintf(a.stdout, "  export NODE_EXTRA_CA_CERTS=%s SSL_CERT_FILE=%s\n", cfg.Home.CA(), cfg.Home.CA())
	}
	fmt.Fprintln(a.stdout, "\nctrl-c stops the daemon; sandboxes go on.")
}

// detached marks the process that an `up --detach` started: it has the same
// arguments and stays.
const detached = "ATOLL_DETACHED"

// startTimeout bounds how long a daemon in the background may take to serve.
const startTimeout = 60 * time.Second

// upDetached starts the same command line without -d as a process of its own
// and returns once it serves.
func (a *app) upDetached(ctx context.Context) error {
	const op = "atoll up"
	home := daemon.Home(a.home)
	if ep, err := home.Endpoint(); err == nil {
		return sandbox.Errorf(op, sandbox.Conflict, a.home, "a daemon runs already (process %d at %s)", ep.PID, ep.URL).WithHint("stop it with `atoll down`")
	}
	if err := os.MkdirAll(a.home, 0o700); err != nil {
		return sandbox.E(op, sandbox.Denied, a.home, err).WithHint("set ATOLL_HOME to a directory that you can write")
	}
	logPath := filepath.Join(a.home, "daemon.log")
	log, err := os.OpenFile(logPath, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return sandbox.E(op, sandbox.Denied, logPath, err)
	}
	defer log.Close()
	begin, _ := log.Seek(0, 2) // what this start writes begins here
	child := exec.Command("/proc/self/exe", os.Args[1:]...)
	child.Args[0] = os.Args[0]
	child.Stdout, child.Stderr = log, log
	child.Env = append(os.Environ(), detached+"=1")
	child.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := child.Start(); err != nil {
		return sandbox.E(op, sandbox.Internal, os.Args[0], err)
	}
	ended := make(chan struct{})
	go func() {
		_ = child.Wait() // its log says why it ended
		close(ended)
	}()
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for {
		if ep, err := home.Endpoint(); err == nil && ep.PID == child.Process.Pid {
			fmt.Fprintln(a.stdout, ep.URL)
			return nil
		}
		select {
		case <-ended:
			said, _ := os.ReadFile(logPath)
			_, _ = a.stderr.Write(said[min(begin, int64(len(said))):])
			return exitError(1)
		case <-ctx.Done():
			return sandbox.E(op, sandbox.Timeout, logPath, ctx.Err()).WithHint("the daemon did not begin to serve; its log says why")
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// downCommand ends the daemon of the state directory.
func (a *app) downCommand() *cobra.Command {
	return &cobra.Command{
		Use: "down", Short: "Stop the daemon; its sandboxes go on", Args: exact(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			const op = "atoll down"
			home := daemon.Home(a.home)
			ep, err := home.Endpoint()
			if err != nil {
				return sandbox.Errorf(op, sandbox.NotFound, a.home, "no daemon runs on this state directory")
			}
			if err := syscall.Kill(ep.PID, syscall.SIGTERM); err != nil {
				return sandbox.E(op, sandbox.Denied, strconv.Itoa(ep.PID), err)
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), startTimeout)
			defer cancel()
			for {
				if now, err := home.Endpoint(); err != nil || now.PID != ep.PID {
					return nil
				}
				select {
				case <-ctx.Done():
					return sandbox.E(op, sandbox.Timeout, strconv.Itoa(ep.PID), ctx.Err()).WithHint("end it by force with `kill -9 " + strconv.Itoa(ep.PID) + "`; its sandboxes go on")
				case <-time.After(20 * time.Millisecond):
				}
			}
		},
	}
}
