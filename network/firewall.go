package network

import (
	"errors"
	"net/netip"
	"sync"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

const (
	tablePrefix = "atoll_" // of the tables of all nodes
	// maxConnections bounds what one sandbox takes of the host's connection table,
	// which commonly holds 262144.
	maxConnections = 8192
	// netlinkBuffer in bytes holds a whole table with thousands of sandboxes in one transaction.
	netlinkBuffer = 64 << 20
	// maxElements of one message: an attribute's length has 16 bits.
	maxElements = 1000
)

// firewall writes one nftables table: a function of the attachments and of
// nothing else, so it can be written anew at any time. Every method is one
// transaction: packets see the table before it or after it.
//
// Packets of a sandbox pass the chains guard (is the source its own?), limit,
// divert (names go to our resolver, web traffic perhaps to our proxy), then
// forward or input, where all that no rule allows is rejected. A device that
// has no chains yet reaches nothing.
type firewall struct {
	prefix string
	pool   netip.Prefix
	group  uint32

	mu       sync.Mutex // one transaction at a time; guards all below
	service  services
	closed   []string         // devices that forwarded nothing before we needed them
	attached map[block]*rules // what the table holds
	setID    uint32           // names sets within a transaction
}

// services is where the host answers sandboxes.
type services struct {
	dns, proxy netip.AddrPort // the same address
}

// table is the handle with which one transaction names things.
type table struct {
	*nftables.Conn
	t                   *nftables.Table
	members             *nftables.Set // device . source address
	egress, diverted    *nftables.Set // device : its chain
	hosts               *nftables.Set // device . address of this host that its policy names
	connections, closed *nftables.Set
}

func (f *firewall) name() string { return tablePrefix + f.prefix }

// begin starts a transaction. f.mu is held.
func (f *firewall) begin() (*table, error) {
	c, err := nftables.New(nftables.WithSockOptions(func(c *netlink.Conn) error {
		return errors.Join(c.SetReadBuffer(netlinkBuffer), c.SetWriteBuffer(netlinkBuffer))
	}))
	if err != nil {
		return nil, err
	}
	t := &nftables.Table{Name: f.name(), Family: nftables.TableFamilyINet}
	pair := nftables.MustConcatSetType(nftables.TypeIFName, nftables.TypeIPAddr)
	set := func(name string, key nftables.SetDatatype) *nftables.Set {
		f.setID++
		return &nftables.Set{Table: t, ID: f.setID, Name: name, KeyType: key}
	}
	vmap := func(name string) *nftables.Set {
		s := set(name, nftables.TypeIFName)
		s.IsMap, s.DataType = true, nftables.TypeVerdict
		return s
	}
	b := &table{Conn: c, t: t,
		members: set("members", pair), hosts: set("hosts", pair),
		egress: vmap("egress"), diverted: vmap("diverted"),
		connections: set("connections", nftables.TypeIPAddr), closed: set("closed", nftables.TypeIFName)}
	b.members.Concatenation, b.hosts.Concatenation = true, true
	b.connections.Dynamic, b.connections.Size = true, 1<<16
	return b, nil
}

// install writes the whole table for the given attachments.
func (f *firewall) install(s services, closed []string, attached map[block]*rules) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.service, f.attached, f.closed = s, attached, closed
	return f.write()
}

// write is install's transaction. f.mu is held.
func (f *firewall) write() error {
	b, err := f.begin()
	if err != nil {
		return err
	}
	b.AddTable(b.t) // so that deleting it cannot fail
	b.DelTable(b.t)
	b.AddTable(b.t)
	for _, s := range []*nftables.Set{b.members, b.hosts, b.egress, b.diverted, b.connections, b.closed} {
		if err := b.AddSet(s, nil); err != nil {
			return err
		}
	}
	for _, device := range f.closed {
		if err := b.SetAddElements(b.closed, []nftables.SetElement{{Key: deviceKey(device)}}); err != nil {
			return err
		}
	}
	f.base(b)
	for k, r := range f.attached {
		if err := f.attach(b, k, r); err != nil {
			return err
		}
	}
	return b.Flush()
}

// base writes the rules that all sandboxes share.
func (f *firewall) base(b *table) {
	add := func(name string, kind nftables.ChainType, hook *nftables.ChainHook, priority nftables.ChainPriority, rules ...[]expr.Any) {
		c := b.AddChain(&nftables.Chain{Table: b.t, Name: name, Type: kind, Hooknum: hook, Priority: &priority})
		for _, exprs := range rules {
			b.AddRule(&nftables.Rule{Table: b.t, Chain: c, Exprs: exprs})
		}
	}
	ours, others := fromGroup(expr.CmpOpEq, f.group), fromGroup(expr.CmpOpNeq, f.group)
	device := &expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1}
	established := state(expr.CtStateBitESTABLISHED | expr.CtStateBitRELATED)
	dns := toPort(f.service.dns.Port())

	// Before connection tracking, so that forged packets leave no trace in it.
	// The wire has two ends only: hardware addresses say nothing about the sender.
	add("guard", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, *nftables.ChainPriorityRaw,
		rule(others, accept()),
		rule(isIPv4(), in(b.members, device, source(2)), accept()),
		rule(drop()))
	add("limit", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, *nftables.ChainPriorityMangle,
		rule(others, accept()),
		rule(state(expr.CtStateBitNEW), clause{source(1), &expr.Dynset{
			SrcRegKey: 1, SetName: b.connections.Name, SetID: b.connections.ID, Operation: unix.NFT_DYNSET_OP_ADD,
			Exprs: []expr.Any{&expr.Connlimit{Count: maxConnections, Flags: expr.NFT_CONNLIMIT_F_INV}}}}, drop()))
	// Ahead of the redirections of container engines at the usual priority.
	add("divert", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, *nftables.ChainPriorityNATDest-10,
		rule(others, accept()),
		rule(protocol(unix.IPPROTO_UDP), toPort(53), redirect(f.service.dns)),
		rule(protocol(unix.IPPROTO_TCP), toPort(53), redirect(f.service.dns)),
		rule(dispatch(b.diverted)))
	// Every packet of a connection that the sandbox opened is judged anew, so a
	// policy that changes cuts connections too. Answers to others pass: the
	// opener was judged.
	add("forward", nftables.ChainTypeFilter, nftables.ChainHookForward, *nftables.ChainPriorityFilter,
		rule(ours, state(expr.CtStateBitINVALID), drop()),
		rule(ours, established, reply(), accept()),
		rule(ours, dispatch(b.egress)),
		rule(ours, protocol(unix.IPPROTO_TCP), resetTCP()),
		rule(ours, prohibit()),
		rule(toGroup(expr.CmpOpEq, f.group), established, accept()),
		rule(toGroup(expr.CmpOpEq, f.group), fromAny(expr.CmpOpNeq, linkPrefix), drop()),
		rule(toAny(expr.CmpOpEq, linkPrefix), accept()), // of this node or judged by its own
		rule(in(b.closed, device), drop()))
	add("input", nftables.ChainTypeFilter, nftables.ChainHookInput, *nftables.ChainPriorityFilter,
		rule(others, isIPv4(), toAddr(f.service.dns.Addr()), metaIs(expr.MetaKeyIIFNAME, expr.CmpOpNeq, deviceKey("lo")), drop()),
		rule(others, accept()),
		rule(established, reply(), accept()),
		rule(toAddr(f.service.dns.Addr()), protocol(unix.IPPROTO_UDP), dns, accept()),
		rule(toAddr(f.service.dns.Addr()), protocol(unix.IPPROTO_TCP), dns, accept()),
		rule(toAddr(f.service.proxy.Addr()), protocol(unix.IPPROTO_TCP), toPort(f.service.proxy.Port()), accept()),
		rule(in(b.hosts, device, destination(2)), accept()),
		rule(protocol(unix.IPPROTO_TCP), resetTCP()),
		rule(prohibit()))
	add("masquerade", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, *nftables.ChainPriorityNATSource,
		rule(isIPv4(), fromPrefix(f.pool), toAny(expr.CmpOpNeq, linkPrefix), metaIs(expr.MetaKeyOIFNAME, expr.CmpOpNeq, deviceKey("lo")), masquerade()))
}

// own names what one attachment has in the table.
type own struct {
	egress, divert *nftables.Chain
	addrs          *nftables.Set
	device         []byte
}

func (f *firewall) own(b *table, k block) own {
	f.setID++
	return own{
		egress: &nftables.Chain{Table: b.t, Name: "egress_" + k.key()},
		divert: &nftables.Chain{Table: b.t, Name: "divert_" + k.key()},
		addrs: &nftables.Set{Table: b.t, ID: f.setID, Name: "addrs_" + k.key(),
			KeyType: nftables.TypeIPAddr, Interval: true},
		device: deviceKey(k.device()),
	}
}

// attach adds one attachment's chains, set and elements to a transaction.
func (f *firewall) attach(b *table, k block, r *rules) error {
	o := f.own(b, k)
	b.AddChain(o.egress)
	b.AddChain(o.divert)
	if err := b.AddSet(o.addrs, nil); err != nil {
		return err
	}
	if err := f.fill(b, o, k, r); err != nil {
		return err
	}
	b.AddRule(&nftables.Rule{Table: b.t, Chain: o.egress, Exprs: rule(in(o.addrs, destination(1)), accept())})
	jump := func(c *nftables.Chain) []nftables.SetElement {
		return []nftables.SetElement{{Key: o.device, VerdictData: &expr.Verdict{Kind: expr.VerdictJump, Chain: c.Name}}}
	}
	return errors.Join(
		b.SetAddElements(b.members, []nftables.SetElement{{Key: deviceAddrKey(k.device(), k.address())}}),
		b.SetAddElements(b.egress, jump(o.egress)),
		b.SetAddElements(b.diverted, jump(o.divert)))
}

// fill writes what depends on the policy.
func (f *firewall) fill(b *table, o own, k block, r *rules) error {
	for elements := intervals(r.addrs); len(elements) > 0; {
		n := min(len(elements), maxElements)
		if err := b.SetAddElements(o.addrs, elements[:n]); err != nil {
			return err
		}
		elements = elements[n:]
	}
	if r.proxied() {
		b.AddRule(&nftables.Rule{Table: b.t, Chain: o.divert, Exprs: rule(in(o.addrs, destination(1)), leave())})
		for _, port := range []uint16{httpPort, httpsPort} {
			b.AddRule(&nftables.Rule{Table: b.t, Chain: o.divert,
				Exprs: rule(protocol(unix.IPPROTO_TCP), toPort(port), redirect(f.service.proxy))})
		}
	}
	if hosts := hostElements(k, r); len(hosts) > 0 {
		return b.SetAddElements(b.hosts, hosts)
	}
	return nil
}

// clear empties what depends on the policy old.
func (f *firewall) clear(b *table, o own, k block, old *rules) error {
	b.FlushSet(o.addrs)
	b.FlushChain(o.divert)
	if hosts := hostElements(k, old); len(hosts) > 0 {
		return b.SetDeleteElements(b.hosts, hosts)
	}
	return nil
}

func hostElements(k block, r *rules) []nftables.SetElement {
	var out []nftables.SetElement
	for _, addr := range r.exact {
		out = append(out, nftables.SetElement{Key: deviceAddrKey(k.device(), addr)})
	}
	return out
}

// set installs an attachment or replaces its policy.
func (f *firewall) set(k block, r *rules) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	b, err := f.begin()
	if err != nil {
		return err
	}
	if old := f.attached[k]; old != nil {
		o := f.own(b, k)
		err = errors.Join(f.clear(b, o, k, old), f.fill(b, o, k, r))
	} else {
		err = f.attach(b, k, r)
	}
	if err != nil {
		return err
	}
	return f.commit(b, func() { f.attached[k] = r })
}

// commit ends a transaction and then does change. If other software has flushed
// nftables, there is nothing to change and the whole table is written.
// f.mu is held.
func (f *firewall) commit(b *table, change func()) error {
	err := b.Flush()
	if err == nil {
		change()
		return nil
	}
	if there, listErr := f.installed(b); listErr != nil || there {
		return err
	}
	change()
	return f.write()
}

// remove takes an attachment out; one that is not there is no error.
func (f *firewall) remove(k block) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	old := f.attached[k]
	if old == nil {
		return nil
	}
	b, err := f.begin()
	if err != nil {
		return err
	}
	o := f.own(b, k)
	err = errors.Join(f.clear(b, o, k, old),
		b.SetDeleteElements(b.members, []nftables.SetElement{{Key: deviceAddrKey(k.device(), k.address())}}),
		b.SetDeleteElements(b.egress, []nftables.SetElement{{Key: o.device}}),
		b.SetDeleteElements(b.diverted, []nftables.SetElement{{Key: o.device}}))
	if err != nil {
		return err
	}
	b.DelChain(o.egress)
	b.DelChain(o.divert)
	b.DelSet(o.addrs)
	return f.commit(b, func() { delete(f.attached, k) })
}
